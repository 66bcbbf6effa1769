"""Where a bundle lies: the demo model, a folder, or a repository on a model hub."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from u2moe.runtime.errors import BundleError
from u2moe.runtime.hub import fetch_bundle, is_repository
from u2moe.runtime.installation import install_command

DEMO = "demo"
"""The name of the demo model wherever a bundle is expected; ./demo is a folder."""


def _demo_folder() -> Path:
    """The folder in a clone, also of an editable installation, or that of the installed u2moe-demo."""
    in_clone = Path(__file__).parent / "demo"
    installed = None if in_clone.is_dir() else find_spec("u2moe_demo")
    folders = (installed and installed.submodule_search_locations) or [str(in_clone)]
    return Path(folders[0])


DEMO_FOLDER = _demo_folder()
"""The demo model, with recordings in `clips/` to try it on; a distribution of its own, which may be missing."""


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """The folder of a bundle.

    Args:
        name: a folder; None or "demo": the demo model; "org/name" or "org/name@revision", where that is no folder: a
            repository of the Hugging Face hub, which is fetched, see `hub`.

    Raises:
        BundleError: the demo model is not installed, or the repository cannot be fetched.
    """
    if name is not None and os.fspath(name) != DEMO:
        folder = Path(name)
        return fetch_bundle(str(name)) if is_repository(str(name)) and not folder.exists() else folder
    if not DEMO_FOLDER.is_dir():
        raise BundleError(f"the demo model is not installed: {install_command('demo')}; or name the folder of a bundle")
    return DEMO_FOLDER
