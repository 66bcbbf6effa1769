"""A bundle on disk, a folder of graphs and one manifest: open, verify, load. `bundle_writer` writes one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2moe.runtime.bundle.files import BundleFile, plain_name
from u2moe.runtime.bundle.graph_file import check_locations
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest
from u2moe.runtime.bundle.manifest_file import format_manifest, parse_manifest
from u2moe.runtime.errors import BundleError
from u2moe.runtime.model.model import Model
from u2moe.runtime.text.vocabulary import Vocabulary, parse_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnxruntime

_MANIFEST_LIMIT = 4 << 20
_TOKENS_LIMIT = 64 << 20
_MOST_ATTEMPTS = 10
"""How often to open a bundle again that is replaced while it is being loaded."""


class Bundle:
    """A verified bundle on disk. Opening reads no graph; `load` does.

    Attributes:
        path: the folder.
        manifest: the manifest.
        tokens: symbols of the vocabulary by id.
    """

    def __init__(self, path: Path, manifest: Manifest, tokens: list[str]) -> None:
        self.path = path
        self.manifest = manifest
        self.tokens = tokens

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, manifest_file: str = MANIFEST_FILE) -> Bundle:
        """Read the manifest and vocabulary of the bundle in folder `path`, and check every file.

        A graph with weights outside the folder, or in a file that the manifest does not list, is refused here if
        `verify` is true, and always by `load`.

        Args:
            path: the folder.
            verify: compare the sha256 of every file with the manifest (about a second per gigabyte). Names, sizes, and
                the sha256 of the files read here are always checked. `load` verifies what it reads again, because
                files may have been replaced in the meantime.
            manifest_file: name of the manifest, which is different while a bundle is being written.

        Raises:
            BundleError: not a bundle, another version, incomplete, or with unknown or invalid fields.
            IntegrityError: a file differs from its digest.
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
        """The vocabulary, with the rules for joining symbols."""
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
        kernels: str | None = None,
        verify: bool = True,
    ) -> Model:
        """Create the onnxruntime sessions of the graphs.

        Files on disk may change afterwards: the sessions keep what they have read. Exception: with the caller's
        `sess_options` they keep reading external weight files, which must then not be truncated or overwritten in
        place. (`BundleWriter` does neither: it replaces the whole folder.)

        Args:
            providers: execution providers in order of preference, with no silent fallback; None: only
                CPUExecutionProvider.
            provider_options: one mapping for each provider.
            num_threads: threads within one operator; None: 1, or as in `sess_options`.
            sess_options: used unchanged for all graphs.
            kernels: "native" for those of the package u2moe-kernels, "onnxruntime" for its own alone, or "auto" for
                native ones where they are installed and can run the graphs. None: the environment variable
                U2MOE_KERNELS, or "auto".
            verify: compare the sha256 of every graph and of its weights with the manifest.

        Raises:
            ProviderError: a provider is not installed or did not start.
            KernelsError: native kernels were requested, but are not installed or cannot run here.
            BundleError: a graph differs from its contract, or has weights in an unlisted file.
            IntegrityError: a file differs from its digest, for example because the bundle was replaced.
        """
        return Model.load(
            self.path,
            self.manifest,
            providers=providers,
            provider_options=provider_options,
            num_threads=num_threads,
            sess_options=sess_options,
            kernels=kernels,
            verify=verify,
        )


def open_and_load(path: str | os.PathLike[str], load: Callable[[Bundle], Model] = Bundle.load) -> tuple[Bundle, Model]:
    """Open and load the bundle in folder `path`; retry if it is replaced in the meantime.

    Every loaded byte is compared with its digest exactly once.

    Args:
        path: the folder.
        load: calls `Bundle.load`.

    Raises:
        BundleError, IntegrityError, ProviderError: as for `Bundle.open` and `Bundle.load`.
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
    """Identity of the bundle at this path, to detect its replacement; None if there is none."""
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
