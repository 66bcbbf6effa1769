"""A bundle on disk, a folder of graphs and one manifest: open, verify, load. `bundle_writer` writes one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2moe.runtime.bundle_files import BundleFile, plain_name
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph_file import check_locations
from u2moe.runtime.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest
from u2moe.runtime.manifest_file import format_manifest, parse_manifest
from u2moe.runtime.model import Model
from u2moe.runtime.text import Vocabulary, parse_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnxruntime

_MANIFEST_LIMIT = 4 << 20
_TOKENS_LIMIT = 64 << 20
_MOST_ATTEMPTS = 10
"""Times that a bundle is opened again which is replaced while it is loaded."""


class Bundle:
    """A verified bundle on disk. Opening reads no graph; `load` does.

    Attributes:
        path: the folder.
        manifest: what the bundle says about itself.
        tokens: symbols of the vocabulary by id.
    """

    def __init__(self, path: Path, manifest: Manifest, tokens: list[str]) -> None:
        self.path = path
        self.manifest = manifest
        self.tokens = tokens

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, manifest_file: str = MANIFEST_FILE) -> Bundle:
        """Read the manifest and the vocabulary of the bundle in folder `path`, and check every file.

        A graph whose weights lie outside the folder, or in a file that the manifest does not list, is refused here if
        `verify` is true, and by `load` in any case.

        Args:
            path: the folder.
            verify: compare the sha256 of every file with the manifest (about a second per gigabyte). Sizes and names
                are always checked, and the sha256 of what is read here. `load` verifies what it reads again, since
                files may have been replaced in between.
            manifest_file: name of the manifest; that of a bundle which is still being written is another.

        Raises:
            BundleError: not a bundle, of another version, incomplete, or with unknown or wrong fields.
            IntegrityError: a file that differs from its digest.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such folder, expected a bundle")
        where = folder / manifest_file
        with BundleFile(folder, manifest_file) as file:
            manifest = parse_manifest(_decoded(where, file.read(_MANIFEST_LIMIT)), where)
        graphs = [graph.file for graph in manifest.model.graphs()]
        for name in (TOKENS_FILE, *graphs):
            if name not in manifest.files:
                raise BundleError(f"{where}: files: {name!r} is not listed, but a bundle of this model needs it")
        for name, digest in manifest.files.items():
            with BundleFile(folder, plain_name(name, f"{where}: files"), digest) as file:
                if verify and name in graphs:
                    check_locations(file, manifest.files)
                elif verify:
                    file.verify()
        return cls(folder, manifest, _read_tokens(folder, manifest))

    @property
    def vocabulary(self) -> Vocabulary:
        """Symbols and the rules that join them."""
        return Vocabulary(self.tokens, self.manifest.text)

    @property
    def fingerprint(self) -> str:
        """sha256 over the manifest, and so over the digest of every file: equal for bundles that recognise alike."""
        return hashlib.sha256(format_manifest(self.manifest).encode()).hexdigest()

    def load(
        self,
        *,
        providers: Sequence[str] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        num_threads: int | None = None,
        sess_options: onnxruntime.SessionOptions | None = None,
        verify: bool = True,
    ) -> Model:
        """Make the onnxruntime sessions of the graphs.

        What is on disk may change afterwards: the sessions keep what they have read. With `sess_options` of the caller
        they go on reading files of weights that lie beside a graph, so that those must not be shortened or overwritten
        in place (`BundleWriter` replaces the whole folder, and does neither).

        Args:
            providers: execution providers in order of preference, never silently replaced by another; None: only
                CPUExecutionProvider.
            provider_options: one mapping for each provider.
            num_threads: threads within one operator; None: 1, or what `sess_options` says.
            sess_options: used as they are, for all graphs.
            verify: compare the sha256 of every graph and of its weights with the manifest.

        Raises:
            ProviderError: a provider that is not installed or did not start.
            BundleError: a graph that differs from its contract, or has weights in a file that is not listed.
            IntegrityError: a file that differs from its digest, as when another bundle has taken this one's place.
        """
        return Model.load(
            self.path,
            self.manifest,
            providers=providers,
            provider_options=provider_options,
            num_threads=num_threads,
            sess_options=sess_options,
            verify=verify,
        )


def open_and_load(path: str | os.PathLike[str], load: Callable[[Bundle], Model] = Bundle.load) -> tuple[Bundle, Model]:
    """Open the bundle in folder `path` and load it; again, where another has taken its place meanwhile.

    Every byte that is loaded is compared with its digest, once.

    Args:
        path: the folder.
        load: calls `Bundle.load`.

    Raises:
        BundleError, IntegrityError, ProviderError: as `Bundle.open` and `Bundle.load`.
    """
    for attempt in range(_MOST_ATTEMPTS):
        before = _identity(path)
        try:
            bundle = Bundle.open(path, verify=False)
            return bundle, load(bundle)
        except BundleError:
            if attempt == _MOST_ATTEMPTS - 1 or _identity(path) == before:
                raise
    raise AssertionError  # the last attempt returns or raises


def _identity(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What tells a bundle from another one at the same place; None: there is none."""
    try:
        status = Path(path, MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{file}: is not UTF-8 at byte {error.start}") from error


def _read_tokens(folder: Path, manifest: Manifest) -> list[str]:
    with BundleFile(folder, TOKENS_FILE, manifest.files[TOKENS_FILE]) as file:
        text = _decoded(file.path, file.read(_TOKENS_LIMIT))
    tokens = parse_tokens(text, file=str(file.path))
    if len(tokens) != manifest.model.vocab_size:
        raise BundleError(f"{file.path}: found {len(tokens)} symbols, expected vocab_size {manifest.model.vocab_size}")
    return tokens
