"""Bundles with a changed manifest, or a changed, missing, exchanged or special file; opened, loaded and used."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from damage import ODD_VALUES, damaged, one_of

from u2moe.runtime import Bundle, Recognizer
from u2moe.runtime.bundle.manifest import MANIFEST_FILE


def use_damaged_bundles(
    bundle: Path, clip: npt.NDArray[np.float32], folder: Path
) -> Callable[[np.random.Generator], str]:
    """Return a function that damages a copy of a bundle, and recognises a clip with it."""
    original, target = folder / "original", folder / "bundle"
    shutil.copytree(bundle, original, ignore=shutil.ignore_patterns("clips", "*.py", "__pycache__", "*.md"))

    def use(random: np.random.Generator) -> str:
        shutil.rmtree(target, ignore_errors=True)
        damage_bundle(original, target, random)
        opened = Bundle.open(target)
        Recognizer(opened, opened.load()).transcribe(clip)
        return "accepted"

    return use


def damage_bundle(original: Path, target: Path, random: np.random.Generator) -> None:
    """Write a damaged copy; changed files keep their old digest or get a correct one."""
    target.mkdir()
    for file in original.iterdir():
        os.link(file, target / file.name)
    names = sorted(file.name for file in original.iterdir() if file.name != MANIFEST_FILE)
    one_of((_damage_manifest, _change_manifest, _exchange, _damage_file, _damage_file, _special), random)(
        original, target, one_of(names, random), random
    )


def _damage_manifest(original: Path, target: Path, _name: str, random: np.random.Generator) -> None:
    _replace(target / MANIFEST_FILE, damaged((original / MANIFEST_FILE).read_bytes(), random))


def _change_manifest(original: Path, target: Path, _name: str, random: np.random.Generator) -> None:
    manifest = json.loads((original / MANIFEST_FILE).read_text(encoding="utf-8"))
    _replace(target / MANIFEST_FILE, json.dumps(with_odd_value(manifest, random)).encode())


def _exchange(original: Path, target: Path, name: str, random: np.random.Generator) -> None:
    """Replace a file by another, or remove it."""
    names = sorted(file.name for file in original.iterdir())
    if random.random() < 0.2:
        (target / name).unlink()
    else:
        _replace(target / name, (original / one_of(names, random)).read_bytes())


def _damage_file(original: Path, target: Path, name: str, random: np.random.Generator) -> None:
    content = damaged((original / name).read_bytes(), random)
    _replace(target / name, content)
    if random.random() < 0.7:
        manifest = json.loads((original / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        _replace(target / MANIFEST_FILE, json.dumps(manifest).encode())


def _special(_original: Path, target: Path, name: str, random: np.random.Generator) -> None:
    """Replace a file, possibly the manifest, by a link to itself, a folder or a pipe."""
    file = target / one_of((name, MANIFEST_FILE), random)
    file.unlink()
    one_of((lambda: file.symlink_to(file), file.mkdir, lambda: os.mkfifo(file)), random)()


def with_odd_value(manifest: Any, random: np.random.Generator) -> Any:
    """Return a manifest with a value replaced by an odd one, removed or added."""
    changed = copy.deepcopy(manifest)
    place = changed
    while True:
        key = one_of(list(place), random)
        if not isinstance(place[key], dict) or not place[key] or random.random() < 0.1:
            break
        place = place[key]
    action, value = int(random.integers(4)), one_of(ODD_VALUES, random)
    if action == 0:
        del place[key]
    elif action == 1:
        place["odd"] = value
    else:
        place[key] = value
    return changed


def _replace(file: Path, content: bytes) -> None:
    """Write a new file instead of writing through the link, so that the original does not change."""
    file.unlink()
    file.write_bytes(content)
