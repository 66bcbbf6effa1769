"""Open, verify and load a bundle: a folder with graphs and a manifest. `bundle_writer` writes bundles."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path

from u2moe.runtime.bundle.files import BundleFiles, plain_name
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, TOKENS_FILE, Manifest
from u2moe.runtime.bundle.manifest_file import format_manifest, parse_manifest
from u2moe.runtime.bundle.signature import signer
from u2moe.runtime.errors import BundleError
from u2moe.runtime.language.model import LanguageModel, LanguageModelOptions
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.model.static_encoder import Runner
from u2moe.runtime.text.vocabulary import Vocabulary, parse_tokens

_TEXT_LIMIT = 64 << 20


class Bundle:
    """A bundle on disk. If the folder is replaced by another bundle, later reads fail, so two bundles are never mixed.

    Attributes:
        path: the folder.
        manifest: the manifest.
        tokens: symbols of the vocabulary by id.
        signer: id of the accepted public key that verified the signature; None: no signature was required.
    """

    def __init__(self, path: Path, manifest: Manifest, tokens: list[str], files: BundleFiles | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.tokens = tokens
        self.signer: str | None = None
        self._files = files or BundleFiles(path, manifest.files)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        manifest_file: str = MANIFEST_FILE,
        public_keys: Collection[str] | None = None,
    ) -> Bundle:
        """Open the bundle in the folder `path`: check its files, and read the manifest and the vocabulary.

        Args:
            path: the folder.
            verify: whether to compare the SHA-256 of every file with that in the manifest. All cores are used. If
                False, only names, sizes and the SHA-256 of the vocabulary are checked. `load` then verifies the files
                that it reads. No file is verified twice.
            manifest_file: name of the manifest. Another name is used while a bundle is being written.
            public_keys: accepted public keys in PEM. One of them must have signed the manifest. The signature is
                checked before the manifest is used. None: no signature is required.

        Raises:
            BundleError: the folder is not a bundle, is incomplete, or has another version, or a field is unknown or
                invalid.
            SignatureError: the bundle is not signed with any of `public_keys`.
            IntegrityError: a file does not match its digest, or the bundle was replaced while it was read.
        """
        folder = Path(path)
        described, where = BundleFiles(folder), folder / manifest_file
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such folder, expected the folder of a bundle")
        if (folder / "train.yaml").is_file() and not where.exists():
            export = f"run 'u2moe export {folder} BUNDLE' first"
            raise BundleError(f"{folder}: is a WeNet checkpoint, not a bundle: {export}")
        content = described.read(manifest_file, _TEXT_LIMIT)
        signed_by = None if public_keys is None else signer(folder, content, public_keys)
        manifest = parse_manifest(_decoded(where, content), where)
        files = BundleFiles(folder, manifest.files)
        for name in (TOKENS_FILE, *(graph.file for graph in manifest.model.graphs())):
            if name not in manifest.files:
                raise BundleError(f"{where}: files: {name!r} is not listed, but a bundle of this model needs it")
        for graph, tensors in manifest.external.items():
            for tensor in tensors:
                if tensor.file not in manifest.files:
                    raise BundleError(
                        f"{where}: external: {graph}: weights are in {tensor.file!r:.200}, which is not listed in files"
                    )
        try:
            for name in manifest.files:
                files.look_at(plain_name(name, f"{where}: files"))
                if verify:
                    files.verify(name)
            tokens = _read_tokens(files, manifest)
        finally:
            described.look_at(manifest_file)  # a replaced bundle explains all other errors, so report it first
        bundle = cls(folder, manifest, tokens, files)
        bundle.signer = signed_by
        return bundle

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary, with the rules for joining its symbols."""
        return Vocabulary(self.tokens, self.manifest.text)

    def language_model(self) -> LanguageModelOptions | None:
        """Read and verify the bundle's language model.

        Returns the model with its weights in the search, or None if the bundle has no language model.

        Raises:
            LanguageModelError: the file is not a compact language model.
            IntegrityError: the file does not match its digest, or was replaced.
        """
        config = self.manifest.decoding.language_model
        if config is None:
            return None
        model = LanguageModel.parse(self._files.read(config.file, 4 << 30), str(self.path / config.file))
        return LanguageModelOptions(model=model, **config.weights)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which contains the digests of all files. Equal bundles have equal fingerprints."""
        return hashlib.sha256(format_manifest(self.manifest).encode()).hexdigest()

    def load(self, settings: SessionSettings | None = None, *, runner: Runner | None = None) -> Model:
        """Create onnxruntime sessions for the graphs, and return them as a model.

        The sessions keep their data in memory, so files on disk may change afterwards. There are two exceptions:
        sessions with the caller's `sess_options`, and sessions with packed weights, keep reading external weight files.
        These files must not be truncated or overwritten in place. `BundleWriter` does neither.

        Args:
            settings: providers, threads and kernels. None: the defaults of `SessionSettings`, on the CPU.
            runner: runs the encoder, instead of onnxruntime, if the bundle has a fixed shape.

        Raises:
            ProviderError: a provider did not start.
            KernelsError: native kernels were requested, but cannot run the graphs.
            BundleError: a graph differs from its contract or from the manifest.
            IntegrityError: a file does not match its digest, or was replaced after the bundle was opened.
        """
        return Model.load(self._files, self.manifest, settings, runner)


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{file}: is not valid UTF-8 at byte {error.start}") from error


def _read_tokens(files: BundleFiles, manifest: Manifest) -> list[str]:
    file = files.folder / TOKENS_FILE
    tokens = parse_tokens(_decoded(file, files.read(TOKENS_FILE, _TEXT_LIMIT)), file=str(file))
    if len(tokens) != manifest.model.vocab_size:
        raise BundleError(f"{file}: found {len(tokens)} symbols, expected vocab_size {manifest.model.vocab_size}")
    return tokens
