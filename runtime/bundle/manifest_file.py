"""Converts the text of bundle.json to and from a `Manifest`. Opens no files."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.errors import BundleError

FORMAT = "u2moe-bundle"


def format_manifest(manifest: Manifest) -> str:
    """The content of bundle.json."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    for digest in content["files"].values():
        if not digest["blocks"]:
            del digest["blocks"]
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: str, where: Path) -> Manifest:
    """The manifest in the content of bundle.json.

    Args:
        text: the content.
        where: the file, for messages.

    Raises:
        BundleError: not JSON, another format or version, or unknown, missing or invalid fields.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise BundleError(f"{where}: format: found {found!r:.80}, expected {FORMAT!r}")
    del content["format"]
    # First of all: a manifest of another version may have any fields.
    version = content.get("version")
    if version != contract.FORMAT_VERSION or isinstance(version, bool):
        remedy = "use the u2moe that wrote the bundle, or export it again"
        if version in range(contract.FORMAT_VERSION):
            remedy = "made by an earlier development version of u2moe: export it again"
        raise BundleError(f"{where}: version: found {version!r:.80}, expected {contract.FORMAT_VERSION}; {remedy}")
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
    """Convert a JSON `value` to the type `kind`: a scalar, Literal, optional, dict, tuple or dataclass of these."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin = get_origin(kind)
    if origin is dict:
        if isinstance(value, dict):
            return {key: _build(get_args(kind)[1], item, f"{where}: {key}") for key, item in value.items()}
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_build(get_args(kind)[0], item, f"{where}: {index}") for index, item in enumerate(value))
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
            raise BundleError(f"{where}: is too large for a 64-bit number") from error
    elif type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise BundleError(f"{where}: found {value!r:.80}, expected {expected}")


_type_hints = functools.cache(get_type_hints)


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where}: found {value!r:.80}, expected an object")
    hints = _type_hints(kind)
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
