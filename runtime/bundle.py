"""A folder of graphs and one manifest: open, verify, write. What is in the manifest is `manifest`'s concern."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import stat
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from u2moe.runtime import contract
from u2moe.runtime.errors import BundleError, IntegrityError
from u2moe.runtime.manifest import MANIFEST_FILE, TOKENS_FILE, FileDigest, Manifest
from u2moe.runtime.model import Model
from u2moe.runtime.text import Vocabulary, parse_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime

FORMAT = "u2moe-bundle"
_MANIFEST_LIMIT = 4 << 20
_TOKENS_LIMIT = 64 << 20


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
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read the manifest and the vocabulary of the bundle in folder `path`, and check every file.

        Args:
            path: the folder.
            verify: compare the sha256 of every file with the manifest (about a second per gigabyte). Sizes and names
                are always checked.

        Raises:
            BundleError: not a bundle, of another version, incomplete, or with unknown or wrong fields.
            IntegrityError: a file that differs from its digest.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such folder, expected a bundle")
        manifest = _parse_manifest(_read_text(folder, MANIFEST_FILE, _MANIFEST_LIMIT), folder / MANIFEST_FILE)
        _check_files(folder, manifest, verify=verify)
        tokens = parse_tokens(_read_text(folder, TOKENS_FILE, _TOKENS_LIMIT), file=str(folder / TOKENS_FILE))
        if len(tokens) != manifest.model.vocab_size:
            raise BundleError(
                f"{folder / TOKENS_FILE}: found {len(tokens)} symbols, expected vocab_size {manifest.model.vocab_size}"
            )
        return cls(folder, manifest, tokens)

    @property
    def vocabulary(self) -> Vocabulary:
        """Symbols and the rules that join them."""
        return Vocabulary(self.tokens, self.manifest.text)

    def load(
        self,
        *,
        providers: Sequence[str] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        num_threads: int | None = None,
        sess_options: onnxruntime.SessionOptions | None = None,
    ) -> Model:
        """Make the onnxruntime sessions of the graphs.

        Args:
            providers: execution providers in order of preference, never silently replaced by another; None: only
                CPUExecutionProvider.
            provider_options: one mapping for each provider.
            num_threads: threads within one operator; None: 1, or what `sess_options` says.
            sess_options: used as they are, for all graphs.

        Raises:
            ProviderError: a provider that is not installed or did not start.
            BundleError: a graph that differs from its contract.
        """
        return Model.load(
            self.path,
            self.manifest,
            providers=providers,
            provider_options=provider_options,
            num_threads=num_threads,
            sess_options=sess_options,
        )


class BundleWriter:
    """Writes a bundle all or nothing.

    Files are staged in a temporary folder beside the target, which takes the target's name in `finish`::

        with BundleWriter(out) as staging:
            staging.add("tokens.txt", content)              # or write into staging.path directly
            onnx.save(graph, staging.path / "encoder.onnx")
            bundle = staging.finish(manifest)

    Leaving the block without `finish`, or by an exception, removes the staged files and leaves the target as it was.
    A target that exists and is not empty is refused, unless `overwrite` is true and it is a bundle itself: holds the
    file `marker`. Folders that are no bundles, for other runtimes, have another marker and end with `publish`.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False, marker: str = MANIFEST_FILE) -> None:
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow the target if it is a link
        self.overwrite = overwrite
        self.marker = marker
        self.path = self.target.parent / f".{self.target.name}.{secrets.token_hex(4)}.partial"

    def __enter__(self) -> Self:
        self._check_target()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk, most of all
            raise BundleError(f"{self.target}: cannot be written: {error.strerror or error}") from error

    def add(self, name: str, content: str | bytes | Path) -> None:
        """Stage one file from text (UTF-8), bytes, or a file that is copied."""
        target = self.path / _plain_name(name, "add")
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content.encode() if isinstance(content, str) else content)

    def seal(self, manifest: Manifest) -> Bundle:
        """Hash every staged file, write the manifest, and open the staged bundle (still in the temporary folder).

        `manifest.files` is replaced by what was found. Sealing again after a change is fine.

        Raises:
            BundleError: a graph or tokens.txt is missing, or the staged files are no bundle.
        """
        digests = {
            file.name: FileDigest(sha256=_sha256(file), size=file.stat().st_size)
            for file in sorted(self.path.iterdir())
            if file.name != MANIFEST_FILE
        }
        sealed = dataclasses.replace(manifest, files=digests)
        content = {"format": FORMAT, **dataclasses.asdict(sealed)}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (self.path / MANIFEST_FILE).write_text(text, encoding="utf-8", newline="\n")
        return Bundle.open(self.path, verify=False)

    def finish(self, manifest: Manifest) -> Bundle:
        """Seal, and move the staged folder to the target. Returns the bundle at the target.

        Sessions that were made from the staged bundle keep working where the system allows to rename open files (not
        on Windows: release them first).
        """
        bundle = self.seal(manifest)
        return Bundle(self.publish(), bundle.manifest, bundle.tokens)

    def publish(self) -> Path:
        """Move the staged folder to the target as it is. Returns the target."""
        self._check_target()
        replaced = self.path.with_suffix(".replaced")
        if self.target.exists():
            self.target.rename(replaced)
        try:
            self.path.rename(self.target)
        except OSError:
            if replaced.exists():
                replaced.rename(self.target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        return self.target

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise BundleError(f"{self.target}: is a file, expected the name of a folder to write a bundle to")
        occupied = any(self.target.iterdir())
        if occupied and not self.overwrite:
            raise BundleError(f"{self.target}: exists and is not empty; ask to overwrite it or name another folder")
        if occupied and not (self.target / self.marker).is_file():
            raise BundleError(f"{self.target}: holds no {self.marker}: only a folder of the same kind is overwritten")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain_name(name: str, field: str) -> str:
    """`name`, if it can only mean a file directly inside the folder, on any system."""
    plain = name not in ("", ".", "..") and not any(char in '/\\:*?"<>|' or ord(char) < 32 for char in name)
    if not plain:
        raise BundleError(f"{field}: found {name!r}, expected a plain file name without folders")
    return name


def _regular_file(folder: Path, name: str) -> Path:
    """Path of a file that is regular and lies in `folder` itself, links followed."""
    file = folder / name
    if not file.exists():
        raise BundleError(f"{file}: missing")
    if file.resolve().parent != folder.resolve():
        raise BundleError(f"{file}: is a link to {file.resolve()}, expected a file inside the bundle")
    if not stat.S_ISREG(file.stat().st_mode):
        raise BundleError(f"{file}: is not a regular file")
    return file


def _read_text(folder: Path, name: str, limit: int) -> str:
    file = _regular_file(folder, name)
    try:
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise BundleError(f"{file}: is larger than {limit} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{file}: is not UTF-8 at byte {error.start}") from error


def _check_files(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    where = folder / MANIFEST_FILE
    for name in (TOKENS_FILE, *(graph.file for graph in manifest.model.graphs())):
        if name not in manifest.files:
            raise BundleError(f"{where}: files: {name!r} is not listed, but a bundle of this model needs it")
    for name, digest in manifest.files.items():
        file = _regular_file(folder, _plain_name(name, f"{where}: files"))
        size = file.stat().st_size
        if size != digest.size:
            raise IntegrityError(f"{file}: size is {size} bytes, expected {digest.size}")
    for name, digest in manifest.files.items() if verify else ():
        found = _sha256(folder / name)
        if found != digest.sha256:
            raise IntegrityError(f"{folder / name}: sha256 is {found}, expected {digest.sha256}")


def _parse_manifest(text: str, where: Path) -> Manifest:
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise BundleError(f"{where}: format: found {found!r:.80}, expected {FORMAT!r}")
    del content["format"]
    # Before anything else: a manifest of another version may have any fields.
    if content.get("version") != contract.FORMAT_VERSION or isinstance(content["version"], bool):
        raise BundleError(
            f"{where}: version: found {content.get('version')!r:.80}, expected {contract.FORMAT_VERSION}; "
            "use the u2moe that wrote the bundle, or export it again"
        )
    manifest: Manifest = _build(Manifest, content, str(where))
    return manifest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key appears twice in {sorted(key for key, _ in pairs)}")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` out of JSON as the type `kind`: a scalar, Literal, optional, dict or dataclass of these."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin = get_origin(kind)
    if origin is dict:
        if isinstance(value, dict):
            return {key: _build(get_args(kind)[1], item, f"{where}: {key}") for key, item in value.items()}
    elif origin is Literal:
        if value in get_args(kind):
            return value
    elif origin in (Union, types.UnionType):
        if value is None:
            return None
        return _build(get_args(kind)[0], value, where)
    elif kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise BundleError(f"{where}: is beyond what a number of 64 bits holds") from error
    elif type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise BundleError(f"{where}: found {value!r:.80}, expected {expected}")


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where}: found {value!r:.80}, expected an object")
    hints = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - known.keys())
    if unknown:
        raise BundleError(f"{where}: unknown field {unknown[0]!r:.80}, expected {sorted(known)}")
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise BundleError(f"{where}: field {name!r} is missing")
    built = {name: _build(hints[name], item, f"{where}: {name}") for name, item in value.items()}
    try:
        return kind(**built)
    except ValueError as error:
        raise BundleError(f"{where}: {error}") from error
