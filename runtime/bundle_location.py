"""Find a bundle: the demo model, a folder, or a repository on a model hub."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from u2moe.runtime.errors import BundleError
from u2moe.runtime.installation import install_command

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?")
DEMO = "demo"
"""Name that selects the demo model wherever a bundle is expected. For a folder named demo, pass the string "./demo"."""
_IN_CLONE = Path(__file__).parent / "demo"
_INSTALLED = None if _IN_CLONE.is_dir() else find_spec("u2moe_demo")
DEMO_FOLDER = Path(((_INSTALLED and _INSTALLED.submodule_search_locations) or [str(_IN_CLONE)])[0])
"""Folder of the demo model, with sample recordings in `clips/`: in a clone or editable installation, or else in the
package u2moe-demo. The model is a separate distribution, so the folder may be missing."""


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """Return the folder of a bundle. A repository of the Hugging Face hub is downloaded.

    The hub's client (the extra [hub]) downloads the files that have changed, and shows progress on stderr. It obeys
    `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_HOME`. The folder is stored below `HF_HOME`. `Bundle` compares
    every file with its digest.

    Args:
        name: a folder, or a repository: "org/name" or "org/name@revision". A local folder with this name takes
            precedence. None or "demo": the demo model.

    Raises:
        BundleError: the demo model or the client is not installed, or the repository or revision does not exist or
            cannot be reached.
    """
    if name is not None and not os.fspath(name):
        raise BundleError("the name of the bundle is empty")
    if name is not None and os.fspath(name) != DEMO:
        folder = Path(name)
        return _fetched(str(name)) if is_repository(str(name)) and not folder.exists() else folder
    if not DEMO_FOLDER.is_dir():
        raise BundleError(f"the demo model is not installed: run {install_command('demo')}, or name a bundle")
    return DEMO_FOLDER


def is_repository(name: str) -> bool:
    """Return whether a name could be that of a repository: "org/name" or "org/name@revision"."""
    return _NAME.fullmatch(name) is not None


def _fetched(name: str) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        hint = install_command("hub")
        raise BundleError(f"{name}: no such folder; to load repositories of the Hugging Face hub, run {hint}") from None
    repository, _, revision = name.partition("@")
    folder = Path(constants.HF_HOME) / "u2moe" / name.replace("/", "--")
    try:
        snapshot_download(repository, revision=revision or None, local_dir=folder, ignore_patterns=[".*", "*.md"])
    except Exception as error:  # the client's errors have no common base class, and differ between its versions
        message = str(error).strip().partition("\n")[0]
        raise BundleError(f"{name}: is not a local folder, and cannot be fetched from the hub: {message}") from error
    return folder
