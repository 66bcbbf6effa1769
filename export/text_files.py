"""Reads the text files of a checkpoint, with limits on memory and time. A `Section` reads yaml key by key.

Feature statistics are in WeNet's global_cmvn, as JSON or Kaldi text. They are needed only if the state dict has none.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor

from u2moe.runtime.errors import CheckpointError, UnsupportedError
from u2moe.runtime.validation import Record, quoted, shortened

LARGEST_TEXT = 1 << 26  # maximum number of characters in a vocabulary or statistics; enough for a million symbols
LARGEST_YAML = 1 << 18  # maximum number of characters in a yaml file. WeNet's files have 2,000 to 10,000
LARGEST_MERGE = 100_000  # keys after merges ("<<"); without a limit, a few hundred characters could fill the memory


class PlainLoader(yaml.SafeLoader):
    """A YAML loader for plain values, with a limit on the number of keys after merges."""

    num_keys = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Expand merges ("<<"). PyYAML calls this for each mapping, and again each time the mapping is merged."""
        super().flatten_mapping(node)
        self.num_keys += len(node.value)
        if self.num_keys > LARGEST_MERGE:
            message = f"merges (<<) expand to more than {LARGEST_MERGE:,} keys"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def read_text(path: Path, *, purpose: str, largest: int = LARGEST_TEXT) -> str:
    """Return the content of a UTF-8 file of up to `largest` characters. CheckpointErrors state its `purpose`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block, and a device might never end
            raise CheckpointError(f"{path}: is not a regular file; {purpose}")
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(largest + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {purpose}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}; {purpose}") from error
    if len(text) > largest:
        raise CheckpointError(f"{path}: is longer than the limit of {largest:,} characters; {purpose}")
    return text


def read_yaml(path: Path, *, purpose: str) -> object:
    """Return the content of a yaml file of plain values. Raises CheckpointError, like `read_text` or for bad yaml."""
    text = read_text(path, purpose=purpose, largest=LARGEST_YAML)
    try:
        return yaml.load(text, PlainLoader)  # noqa: S506 - a SafeLoader
    except Exception as error:  # for explicit tags that do not fit, pyyaml raises KeyError, AttributeError and others
        raise CheckpointError(f"{path}: is not plain yaml: {type(error).__name__}: {error}") from error


CMVN_MEAN = "encoder.global_cmvn.mean"
CMVN_ISTD = "encoder.global_cmvn.istd"
"""Names of the statistics in a state dict."""
ROUNDING = 1e-6  # a negative variance of up to this part of the mean square can come from rounding to seven digits


def read_cmvn(path: Path, size: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the inverse standard deviation of each feature, as tensors [size]."""
    trained = "the network was trained with feature statistics, which must be in this file"
    text = read_text(path, purpose=f"{trained}, because the state dict has no {CMVN_MEAN}")
    try:
        if text.lstrip().startswith("{"):
            stats = json.loads(text)
            sums, squares = (np.array(stats[key], dtype=np.float64) for key in ("mean_stat", "var_stat"))
            count = float(stats["frame_num"])
        else:  # a matrix of two rows: the sums of features and the frame count, then the sums of squares and 0
            words = text.split()
            if len(words) < 6 or words[0] != "[" or words[-1] != "]" or len(words) % 2:
                raise ValueError("expected '[ sums count sums-of-squares 0 ]'")  # noqa: TRY301 - caught below
            matrix = np.array(words[1:-1], dtype=np.float64).reshape(2, -1)
            sums, squares, count = matrix[0, :-1], matrix[1, :-1], float(matrix[0, -1])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a statistics file in JSON or Kaldi text format: {error}") from error
    if sums.shape != (size,) or squares.shape != (size,):
        raise CheckpointError(f"{path}: has {sums.size} means and {squares.size} variances, expected {size} of each")
    if not (np.isfinite(count) and count > 0 and np.isfinite(sums).all() and np.isfinite(squares).all()):
        raise CheckpointError(f"{path}: has feature sums that are not finite, or has no frames (frame count {count})")
    with np.errstate(over="ignore", invalid="ignore"):
        mean, mean_square = sums / count, squares / count
        variance = mean_square - mean * mean
        if (variance < -ROUNDING * mean_square).any():
            raise CheckpointError(f"{path}: the sums of squares are too small for the sums (frame count {count:g})")
        variance = np.maximum(variance, 1e-20)
        statistics = mean.astype(np.float32), (1.0 / np.sqrt(variance)).astype(np.float32)
    if not np.isfinite(statistics).all():
        raise CheckpointError(f"{path}: has means or variances that are not finite in float32")
    return torch.from_numpy(statistics[0]), torch.from_numpy(statistics[1])


Choice = TypeVar("Choice", bound=str)
MOST_NAMES = 10
LARGEST_SIZE = 1 << 20  # default limit for whole numbers in the file. The product of three such sizes fits in 64 bits
NAMEABLE = re.compile("[^\0\ud800-\udfff]*")


class Section(Record):
    """A mapping in a file; the top level if `name` is empty. If `is_whole` is false, keys may remain unread."""

    def __init__(self, file: str, values: object, name: str = "", *, is_whole: bool = True) -> None:
        super().__init__(values, name)
        self.file = file
        self._is_whole = is_whole
        self._sections: list[Section] = []

    def unsupported(self, key: str, found: object, supported: Iterable[str]) -> UnsupportedError:
        """Return the error for a value that WeNet supports and this project does not."""
        told = f"{self.file}: {self.field(key)} is {quoted(found)}, which is not supported; supported: "
        return UnsupportedError(told + ", ".join(supported))

    def refuse(self, keys: Iterable[str], reason: str) -> None:
        """Refuse each of `keys` that is present and not null."""
        for key in keys:
            if self.value(key) is not None:
                raise self.unsupported(key, self.value(key), (f"none, because {reason}",))

    def section(self, key: str, *, is_whole: bool = True) -> Section:
        """Return the mapping under `key`; an empty section if there is none."""
        value = self.value(key)
        self._sections.append(Section(self.file, {} if value is None else value, self.field(key), is_whole=is_whole))
        return self._sections[-1]

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """Return the whole number under `key`. Without a default, the key is required."""
        return super().integer(key, default, least=least, most=most)

    def optional_text(self, key: str) -> str | None:
        """Return the string under `key`; None if it is null or missing. It must be possible as a file name."""
        value = self.value(key)
        if value is not None and not (isinstance(value, str) and NAMEABLE.fullmatch(value)):
            raise self.wrong(key, value, "a string or null")
        return value

    def choice(self, key: str, default: Choice, supported: tuple[Choice, ...]) -> Choice:
        """Return the name under `key`; `default` if it is missing. A name that is not in `supported` is refused."""
        value = self.value(key, default)
        for name in supported:
            if value == name:
                return name
        raise self.unsupported(key, value, supported)

    def finish(
        self, without_effect: Mapping[str, Iterable[str]], one_value: Mapping[str, Mapping[str, object]]
    ) -> None:
        """Refuse unknown keys here and in the sections below, because they may change the network.

        By section, `without_effect` are keys that have no effect, and `one_value` are keys with their only supported
        value, which is also the default.
        """
        for section in self._sections:
            section.finish(without_effect, one_value)
        if not self._is_whole:
            return
        for key, only in one_value.get(self.name, {}).items():
            value = self.value(key, only)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                raise self.unsupported(key, value, (repr(only),))
        self.known.update(without_effect.get(self.name, ()))
        unknown = sorted(map(_key, self.unread()))
        if unknown:
            where = f"{self.file}: {self.name}" if self.name else self.file
            more = f" and {len(unknown) - MOST_NAMES} more" if len(unknown) > MOST_NAMES else ""
            raise UnsupportedError(
                f"{where} has unknown keys {', '.join(unknown[:MOST_NAMES])}{more}, which may change the network: "
                f"remove those that have no effect; known keys: {', '.join(sorted(map(_key, self.known))) or 'none'}"
            )


def _key(key: object) -> str:
    """Return a key for use in a message, in quotes only if it needs them."""
    return shortened(key) if isinstance(key, str) and key.isprintable() else quoted(key)
