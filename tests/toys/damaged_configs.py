"""Training configurations with changed values, odd texts, aliases and nesting that YAML allows, and changed bytes."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from damage import damaged, one_of

from u2moe.export.training_config import read_training_config
from u2moe.export.weights import expected_shapes

_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 1000, 20_000, 10**6, 10**9, 2**63, 10**400, 0.5, -0.5, 1e308,
    float("nan"), float("inf"), "", "x", "1e-5", "1e999", "a\0b", "\ud800", "../../etc/passwd", "y" * 300, "null",
    "transformer", "conformer", "conv2d8", "moe", "gated", "batch_norm", "rms_norm", "abs_pos", "selfattn", [], {},
    [[]], {"a": {}}, {None: 1}, b"\xff\x00",
)  # fmt: skip
_ODD_TEXTS = (
    "!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!null x",
    "!!python/name:os.system", "!!python/object/apply:os.system [id]", "2001-13-45", "2001-01-01", "*nothing",
    "0x" + "f" * 30_000, "9" * 5_000, "1:" * 5_000 + "1", "&a [*a]", "&b {c: *b}", "<<", "{<<: 1}", "{? [1] : 2}",
    "'open", "|\n ", "\t", "%", "---", "...", "\u2028", "\x07",
)  # fmt: skip
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "latin-1", "gbk", "cp037")


def use_damaged_configs(originals: Sequence[Path], folder: Path) -> Callable[[np.random.Generator], str]:
    """Return a function that reads a damaged file and builds its network, without weights."""
    texts, file = [original.read_text(encoding="utf-8") for original in originals], folder / "train.yaml"

    def use(random: np.random.Generator) -> str:
        file.write_bytes(damaged_config(texts, random))
        with warnings.catch_warnings(action="error"):
            expected_shapes(read_training_config(file).architecture)
        return "accepted"

    return use


def damaged_config(originals: Sequence[str], random: np.random.Generator) -> bytes:
    """Return one of the originals with changed values, then changed text, encoding or bytes."""
    config = yaml.safe_load(one_of(originals, random))
    for _ in range(int(random.integers(0, 4))):
        one_of((_replace, _replace, _replace, _delete, _add, _share, _nest), random)(config, random)
    text = yaml.dump(config, allow_unicode=bool(random.random() < 0.5), default_flow_style=one_of((None, True), random))
    for _ in range(int(random.integers(0, 3)) if random.random() < 0.5 else 0):
        text = one_of((_with_odd_text, _with_laughs, _repeated, _deep), random)(text, random)
    if random.random() < 0.1:
        return text.encode(one_of(_ENCODINGS, random), errors="replace")
    content = text.encode("utf-8", errors="surrogatepass")
    return damaged(content, random) if random.random() < 0.2 else content


def _place(config: dict[Any, Any], random: np.random.Generator) -> tuple[dict[Any, Any], Any]:
    """Return a mapping anywhere in the file, and one of its keys."""
    place = config
    while True:
        key = one_of(list(place), random)
        if not isinstance(place[key], dict) or not place[key] or random.random() < 0.1:
            return place, key
        place = place[key]


def _replace(config: dict[Any, Any], random: np.random.Generator) -> None:
    place, key = _place(config, random)
    place[key] = copy.deepcopy(one_of(_ODD_VALUES, random))


def _delete(config: dict[Any, Any], random: np.random.Generator) -> None:
    place, key = _place(config, random)
    if len(config) > 1:
        del place[key]


def _add(config: dict[Any, Any], random: np.random.Generator) -> None:
    """Add a key that is unknown there, or that belongs elsewhere."""
    place, _ = _place(config, random)
    _, key = _place(config, random)
    value = copy.deepcopy(one_of(_ODD_VALUES, random))
    place[one_of((key, "odd", 3, None, True, "n_expert", "mlp_type", "head_dim", "n_kv_head"), random)] = value


def _share(config: dict[Any, Any], random: np.random.Generator) -> None:
    """Put one value in two places: yaml.dump writes an alias."""
    (source, key), (target, other) = _place(config, random), _place(config, random)
    target[other] = source[key]


def _nest(config: dict[Any, Any], random: np.random.Generator) -> None:
    place, key = _place(config, random)
    for _ in range(int(2 ** random.uniform(0, 6))):
        place[key] = [place[key]] if random.random() < 0.5 else {"a": place[key]}


def _with_odd_text(text: str, random: np.random.Generator) -> str:
    """Put odd text in place of a value or a line."""
    lines = text.split("\n")
    number = int(random.integers(len(lines)))
    key, colon, _ = lines[number].partition(": ")
    lines[number] = f"{key}{colon if random.random() < 0.9 else ''}{one_of(_ODD_TEXTS, random)}"
    return "\n".join(lines)


def _with_laughs(text: str, random: np.random.Generator) -> str:
    """Add aliases of aliases, in lists or merged mappings, which grow exponentially."""
    width, depth = int(random.integers(2, 20)), int(random.integers(1, 40))
    form: Callable[[str], str] = one_of((lambda inner: f"[{inner}]", lambda inner: f"{{<<: [{inner}]}}"), random)
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{level}: &a{level} {form(', '.join([f'*a{level - 1}'] * width))}" for level in range(1, depth)]
    return "\n".join(lines) + "\n" + text + f"\nencoder_conf: *a{depth - 1}\n"


def _repeated(text: str, random: np.random.Generator) -> str:
    """Repeat a line or the whole file many times."""
    part = one_of((*text.split("\n"), text), random)
    return text + f"\n{part}" * int(2 ** random.uniform(0, 12))


def _deep(text: str, random: np.random.Generator) -> str:
    """Put a value inside many brackets, closed or not."""
    depth, bracket = int(2 ** random.uniform(0, 17)), one_of(("[", "{a: ", "- ", "? "), random)
    closing = {"[": "]", "{a: ": "}"}.get(bracket, "") * depth
    return f"{text}\nodd: {bracket * depth}1{closing if random.random() < 0.5 else ''}\n"
