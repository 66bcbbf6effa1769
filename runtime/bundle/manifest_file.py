"""Converts the text of bundle.json to and from a `Manifest`. Does not open files.

Older programs can read newer bundles. A field with its default value is not written, so a program that does not know
the field can read the bundle. Older programs may also ignore some fields that have other values. The
object that contains such a field names it under the key `harmless`, with the effect of ignoring the field.
"""

import contextlib
import dataclasses
import functools
import json
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest, as_text
from u2moe.runtime.declarations import HARMLESS, default_of, plain
from u2moe.runtime.errors import BundleError, BundleWarning
from u2moe.runtime.validation import checked_choice, checked_number, checked_object, refused_as, wrong

FORMAT = "u2moe-bundle"
_SCALARS = {bool: "true or false", int: "an integer", str: "a string"}


def format_manifest(manifest: Manifest) -> str:
    """Return the content of bundle.json."""
    content = {"format": FORMAT, "version": contract.FORMAT_VERSION, **plain(manifest)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: str, where: Path) -> Manifest:
    """Parse bundle.json. Raises BundleError, which begins with `where`; warns of unknown fields that are harmless."""
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not valid JSON: {error}") from error
    with refused_as(BundleError, where):
        if (found := checked_object("", content).pop("format", None)) != FORMAT:
            raise wrong("format", repr(FORMAT), found)
        # Check the version first, because other versions may have any fields.
        version = content.pop("version", None)
        if version != contract.FORMAT_VERSION or isinstance(version, bool):
            expected = f"{contract.FORMAT_VERSION} (use the u2moe that wrote the bundle, or export it again)"
            raise wrong("version", expected, version)
        manifest: Manifest = _Reader(where, content.get("producer")).built(Manifest, content, "")
    return manifest


def check_metadata(metadata: Mapping[str, str], manifest: Manifest, where: Path) -> None:
    """Raise BundleError if a graph's metadata differ from the manifest. Graphs without metadata are accepted."""
    if f"{contract.METADATA_PREFIX}version" not in metadata:
        return
    reader = _Reader(where, manifest.producer)
    for part in (manifest.model, manifest.features, manifest.text):
        hints = _type_hints(type(part))
        for item in dataclasses.fields(part):
            key, own, default = f"{contract.METADATA_PREFIX}{item.name}", getattr(part, item.name), default_of(item)
            text = metadata.get(key, None if default is dataclasses.MISSING else as_text(default))
            if text is not None and own != (text if isinstance(own, str) else reader.parsed(hints[item.name], text)):
                raise BundleError(f"{where}: metadata {key} is {text!r:.80}, expected {as_text(own)!r}")


class _Reader:
    """Builds the manifest's objects from JSON. Its ValueErrors name the invalid field."""

    def __init__(self, where: Path, producer: object) -> None:
        self._where = where  # for warnings
        self._by = f"the bundle was written by {producer!s:.80}"

    def parsed(self, kind: Any, text: str) -> Any:
        """Parse a value of type `kind` from a JSON text. Returns None if the text is not such a value."""
        try:
            return self.built(kind, json.loads(text), "")
        except ValueError:
            return None

    def built(self, kind: Any, value: Any, name: str) -> Any:
        """Convert a JSON `value` to the type `kind`: a scalar, Literal, optional, dict, tuple or dataclass of these."""
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._object(kind, checked_object(name, value), name)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            return None if value is None and types.NoneType in arguments else self.built(arguments[0], value, name)
        if origin is dict:
            items = checked_object(name, value).items()
            return {key: self.built(arguments[1], item, _within(name, key)) for key, item in items}
        if origin is tuple:
            if not isinstance(value, list):
                raise wrong(name, "a list", value)
            return tuple(self.built(arguments[0], item, _within(name, index)) for index, item in enumerate(value))
        if origin is Literal:
            return checked_choice(name, value, arguments)
        if kind is float:
            return checked_number(name, value)
        if type(value) is not kind:
            raise wrong(name, _SCALARS[kind], value)
        return value

    def _object(self, kind: Any, content: dict[str, Any], name: str) -> Any:
        known, hints = {each.name: each for each in dataclasses.fields(kind)}, _type_hints(kind)
        harmless = checked_object(_within(name, HARMLESS), content.get(HARMLESS, {}))
        for unknown in sorted(content.keys() - known.keys() - {HARMLESS}):
            message = f"{_within(name, unknown)} is a field that this version of u2moe does not know; {self._by}"
            if unknown not in harmless:
                raise ValueError(f"{message}: use that version, or a newer one")
            message = f"{self._where}: {message}. Without the field: {harmless[unknown]!s:.200}"
            warnings.warn(message, BundleWarning, stacklevel=2)
        for each in known.values():
            if each.name not in content and default_of(each) is dataclasses.MISSING:
                raise ValueError(f"{_within(name, each.name)} is missing")
        built = {key: self.built(hints[key], content[key], _within(name, key)) for key in known if key in content}
        with refused_as(ValueError, name) if name else contextlib.nullcontext():
            return kind(**built)


def _within(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key appears twice in {sorted(key for key, _ in pairs)}")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
