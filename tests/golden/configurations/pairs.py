"""Covers every accepted pair of settings with small networks: python pairs.py design | table, see README.md."""

import json
import random
import sys
from itertools import combinations
from pathlib import Path
from typing import get_args

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
sys.path.append(str(FOLDER.parents[1] / "toys"))

from packed import write_text  # noqa: E402 - in the folder above
from wenet_directories import CONFIGURATIONS, PAIRS, configured  # noqa: E402

from u2moe.export.architecture import (  # noqa: E402
    FEED_FORWARDS,
    LAYER_NORMS,
    POSITIONS,
    SUBSAMPLING_KINDS,
    NormKind,
)
from u2moe.export.encoders.branchformer import MERGE_METHODS  # noqa: E402
from u2moe.export.encoders.kinds import KINDS  # noqa: E402
from u2moe.export.encoders.squeezeformer import NORMS, REDUCTIONS  # noqa: E402
from u2moe.export.proofs import FILE, settings  # noqa: E402
from u2moe.export.training_config import parse_training_config  # noqa: E402
from u2moe.runtime.errors import CheckpointError, UnsupportedError  # noqa: E402
from u2moe.runtime.graph.activation import ACTIVATIONS  # noqa: E402

PAGE, START, END = ROOT / "docs" / "export.md", "<!-- pairs: written by pairs.py -->\n", "<!-- end of pairs -->\n"
FLAGS = (True, False)
BIASES = {f"{name}_bias": FLAGS for name in ("query", "key", "value")}
ATTENTION = {"input_layer": SUBSAMPLING_KINDS, "pos_enc_layer_type": POSITIONS, "n_kv_head": (None, 1), **BIASES}
FEED_FORWARD = {"activation_type": tuple(ACTIVATIONS), "mlp_type": tuple(FEED_FORWARDS), "mlp_bias": FLAGS}
ORDER = {"normalize_before": FLAGS}
GATING = {"gate_activation": ("identity", *ACTIVATIONS), "use_linear_after_conv": FLAGS, "causal": FLAGS}
KINDS_OF_ATTENTION = ("selfattn", "rel_selfattn", "shaw_rel_selfattn", "rope_abs_selfattn")
CONFORMER = {"cnn_module_norm": get_args(NormKind), "macaron_style": FLAGS, "causal": FLAGS, "normalize_before": FLAGS}
TRANSFORMER = {
    **ATTENTION, **FEED_FORWARD, **ORDER, "layer_norm_type": LAYER_NORMS, "selfattention_layer_type": KINDS_OF_ATTENTION
}  # fmt: skip
CHUNKS = {
    "any": {"use_dynamic_chunk": True},
    "fixed": {"use_dynamic_chunk": False, "static_chunk_size": 4},
    "none": {"use_dynamic_chunk": False},
}


def choices(encoder):
    """Return the possible values of each key of a kind's encoder_conf."""
    if encoder.removeprefix("dual_") == "transformer":
        return TRANSFORMER
    if encoder.removeprefix("dual_") == "conformer":
        own = {} if encoder.startswith("dual_") else {"final_norm": FLAGS}
        return {**TRANSFORMER, **CONFORMER, **own, "use_cnn_module": FLAGS, "conv_bias": FLAGS}
    if encoder == "efficientConformer":
        return {**CONFORMER, "input_layer": SUBSAMPLING_KINDS, "activation_type": tuple(ACTIVATIONS)}
    if encoder == "squeezeformer":
        own = {"time_reduction_layer_type": REDUCTIONS, "cnn_norm_type": NORMS, "activation_type": tuple(ACTIVATIONS)}
        return own | dict.fromkeys(("adaptive_scale", "do_rel_shift", "dw_stride", "causal", *ORDER), FLAGS)
    shared = {**ATTENTION, **GATING, "selfattention_layer_type": KINDS_OF_ATTENTION, "layer_norm_type": LAYER_NORMS}
    if encoder == "branchformer":
        return {**shared, "merge_method": MERGE_METHODS}
    return {**shared, **FEED_FORWARD, "macaron_style": FLAGS, "use_ffn": FLAGS}


DECODER = {
    **FEED_FORWARD, **ORDER, **BIASES, "input_layer": ("embed", "embed_learnable_pe"), "n_kv_head": (None, 1),
    "layer_norm_type": LAYER_NORMS,
}  # fmt: skip
SOURCE = {f"src_{key}": FLAGS for key in BIASES}
SIZES = {
    "squeezeformer": {},
    "branchformer": {"cgmlp_linear_units": 12, "cgmlp_conv_kernel": 5},
    "e_branchformer": {"cgmlp_linear_units": 12, "cgmlp_conv_kernel": 5, "linear_units": 12},
}
"""Keys of encoders that do not have `linear_units`."""


def drawn(chance, encoder):
    """Return arguments of `random_config` for a small network with random settings, accepted or not."""
    decoder = chance.choice(("bitransformer", "transformer"))
    tables = choices(encoder), DECODER | (SOURCE if decoder == "transformer" else {})
    conf, other = ({key: chance.choice(values) for key, values in table.items()} for table in tables)
    conf |= CHUNKS[chance.choice(list(CHUNKS))] | SIZES.get(encoder, {"linear_units": 12}) | {"attention_heads": 2}
    is_stacked = conf.get("input_layer") == "stack_n_frames"  # with positions, the width is that of stacked frames
    conf["output_size"] = dim = 16 if is_stacked else 8
    if "conformer" in encoder.lower() or encoder == "squeezeformer":
        conf["cnn_module_kernel"] = 4 if conf["causal"] else 7
    if encoder == "squeezeformer":
        conf["encoder_dim"] = dim
    if encoder == "efficientConformer" and "static_chunk_size" in conf:
        conf["static_chunk_size"] = 12  # whole groups of frames
    for own in (conf, other):
        if own.get("mlp_type") == "moe":
            own["n_expert"] = 3
        if own.pop("n_kv_head", None):
            own.update(n_kv_head=1, head_dim=dim // 2)
    return {
        "encoder": encoder, "decoder": decoder, "encoder_conf": conf,
        "decoder_conf": {"attention_heads": 2, "linear_units": 12, "num_blocks": 1, **other},
        "num_mel_bins": 8 if is_stacked else 16, "vocab_size": 16,
    }  # fmt: skip


def pairs_of(arguments):
    """Return all pairs of settings of a configuration's network; none if it is refused."""
    try:
        architecture = parse_training_config(configured(arguments)[0]).architecture
    except (CheckpointError, UnsupportedError):
        return frozenset()
    return frozenset(
        (part, *first, *second)
        for part, own in settings(architecture).items()
        for first, second in combinations(own, 2)
    )


def proved_pairs():
    """Return the pairs of all configurations that have outputs of WeNet."""
    known = [name for name in CONFIGURATIONS if (FOLDER / f"{name}.npy.xz").exists()]
    return frozenset().union(*(pairs_of({"vocab_size": 31, **CONFIGURATIONS[name]}) for name in known))


def networks(chance, draws):
    """Return accepted configurations from `draws` draws for each kind of encoder, with the pairs of each."""
    every = [drawn(chance, encoder) for encoder in KINDS for _ in range(draws)]
    return [(arguments, pairs) for arguments in every if (pairs := pairs_of(arguments))]


def designed(seed=1):
    """Return configurations for the missing accepted pairs, each chosen because it has most of them."""
    known = networks(random.Random(seed), 2000)
    missing, chosen = frozenset().union(*(pairs for _, pairs in known)) - proved_pairs(), []
    while missing:
        arguments, pairs = max(known, key=lambda network: len(network[1] & missing))
        missing -= pairs
        chosen.append(arguments)
    return chosen


def table(pairs):
    """Return the pairs in the form that `proofs.proved` reads."""
    found = {}
    for part, key, value, other, wanted in sorted(pairs):
        row = found.setdefault(part, {}).setdefault(f"{key} {value}", {})
        row[other] = f"{row[other]} {wanted}" if other in row else wanted
    return found


SHOWN = ("encoder", "input_layer", "pos_enc_layer_type", "selfattention_layer_type", "normalize_before")


def page(proved):
    """Return the table of the page: values of the most important settings that occur together."""
    values, together = {key: set() for key in SHOWN}, {}
    for part, key, value, other, wanted in proved:
        if part == "encoder" and key in SHOWN and other in SHOWN:
            values[key].add(value)
            values[other].add(wanted)
            together.setdefault((key, value, other), set()).add(wanted)

    def cell(key, value, other):
        found = together.get((key, value, other), set())
        rest = values[other] - found
        listed = ", ".join(f"`{each}`" for each in sorted(min(found, rest, key=len)))
        if not found:
            return ""
        return listed if len(found) <= len(rest) else f"all{' but ' if rest else ''}{listed}"

    lines = [f"| setting | {' | '.join(f'`{key}`' for key in SHOWN[1:])} |", "| --- |" + " --- |" * len(SHOWN[1:])]
    for key in SHOWN[:-1]:
        lines += [
            f"| `{value}` | {' | '.join(cell(key, value, other) for other in SHOWN[1:])} |"
            for value in sorted(values[key])
        ]
    number = f"{len(CONFIGURATIONS)} networks confirm {len(proved):,} pairs of settings."
    return f"{number} The most important ones:\n\n" + "\n".join(lines) + "\n"


def text_of(found):
    """Return the content of `proved.json`, one row for each setting."""
    parts = []
    for part, rows in found.items():
        lines = (f"  {json.dumps(first)}: {json.dumps(row)}" for first, row in rows.items())
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1] == "design":
        first = len(PAIRS) + 1
        PAIRS |= {f"pair_{number}": arguments for number, arguments in enumerate(designed(), start=first)}
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(arguments)}" for name, arguments in PAIRS.items())
        write_text(FOLDER / "pairs.json.xz", f"{{\n{rows}\n}}\n")
        print(f"{len(PAIRS) + 1 - first} configurations added: run make.py")
    else:
        proved = proved_pairs()
        (ROOT / "export" / FILE).write_text(text_of(table(proved)), encoding="utf-8")
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(before + START + page(proved) + END + rest.split(END)[1], encoding="utf-8")
