"""Bundles in repositories of the Hugging Face hub, fetched by its own client (the extra [hub])."""

from __future__ import annotations

import re
from pathlib import Path

from u2moe.runtime.errors import BundleError
from u2moe.runtime.installation import install_command

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?")


def is_repository(name: str) -> bool:
    """Whether a name may be that of a repository: "org/name", or "org/name@revision"."""
    return _NAME.fullmatch(name) is not None


def fetch_bundle(name: str) -> Path:
    """The folder with the newest files of a repository, of which only those that changed are fetched.

    The environment of the client holds: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` (there the folder lies), `HF_HUB_OFFLINE`.
    It shows its progress on stderr. Nothing is verified here: `Bundle` compares every file with its digest.

    Raises:
        BundleError: the client is not installed, or there is no such repository or revision, or it cannot be reached.
    """
    try:
        from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        hint = install_command("hub")
        raise BundleError(f"{name}: no such folder; for repositories of the Hugging Face hub: {hint}") from None
    repository, _, revision = name.partition("@")
    folder = Path(constants.HF_HOME) / "u2moe" / name.replace("/", "--")
    try:
        snapshot_download(repository, revision=revision or None, local_dir=folder, ignore_patterns=[".*", "*.md"])
    except Exception as error:  # the client's errors have no common base, and change with its versions
        message = str(error).strip().partition("\n")[0]
        raise BundleError(f"{name}: no such folder, and cannot be fetched from the hub: {message}") from error
    return folder
