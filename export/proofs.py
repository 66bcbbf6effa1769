"""Refuses networks with a pair of settings that no comparison with WeNet's own code covers.

`proved.json` lists the covered pairs; tests/golden/configurations/pairs.py writes it from the golden outputs of WeNet.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from itertools import combinations
from os import PathLike

from u2moe.export.architecture import Architecture, Attention, Decoder, EncoderArchitecture
from u2moe.runtime.errors import UnsupportedError

FILE = "proved.json"
BIASES = ("query_bias", "key_bias", "value_bias")
OWN = {
    "merge": "merge_method", "linear": "use_linear_after_conv", "activation": "gate_activation",
    "feed_forward": "use_ffn", "reduction": "time_reduction_layer_type", "adaptive": "adaptive_scale",
    "shifted": "do_rel_shift", "depthwise_subsampling": "dw_stride",
}  # fmt: skip
"""For settings that only some kinds of encoder have: WeNet's key, by the name of our field."""


def settings(architecture: Architecture) -> dict[str, list[tuple[str, str]]]:
    """Return the settings (key, value) of a network's encoder and, if present, decoder. Sizes are left out."""
    encoder, left = architecture.encoder, architecture.left_decoder
    gating, convolution = getattr(encoder.own, "gating", None), encoder.convolution
    causal = gating or convolution
    own = (each for each in (encoder.own, gating) if each is not None)
    heads = encoder.attention
    kinds = {"rope_abs_selfattn": heads.rotary, "shaw_rel_selfattn": heads.by_distance, "rel_selfattn": heads.relative}
    kinds["selfattn"] = True
    found: dict[str, dict[str, object]] = {
        "encoder": {
            "encoder": encoder.kind, "input_layer": encoder.subsampling, "pos_enc_layer_type": encoder.positions,
            "selfattention_layer_type": next(kind for kind, is_used in kinds.items() if is_used),
            "macaron_style": encoder.macaron, "final_norm": encoder.final_norm,
            "chunks": "any" if encoder.dynamic_chunk else "fixed" if encoder.static_chunk_size else "none",
            "cnn_module_norm": convolution.norm.kind if convolution else "none",
            **({"conv_bias": convolution.bias} if convolution else {}),
            **({"causal": causal.causal} if causal else {}),
            **_of_blocks(encoder, heads),
            **{name: getattr(each, field) for each in own for field, name in OWN.items() if hasattr(each, field)},
        }
    }  # fmt: skip
    if left is not None:
        found["decoder"] = {
            "decoder": "bitransformer" if architecture.right_decoder else "transformer",
            "input_layer": "embed_learnable_pe" if left.learned_positions else "embed",
            **_of_blocks(left, left.self_attention),
            **{f"src_{key}": getattr(left.cross_attention, key) for key in BIASES},
        }
    return {
        part: [(key, str(value).lower() if isinstance(value, bool) else str(value)) for key, value in own.items()]
        for part, own in found.items()
    }


def _of_blocks(network: EncoderArchitecture | Decoder, attention: Attention) -> dict[str, object]:
    feed_forward = network.feed_forward
    return {
        "normalize_before": network.pre_norm, "activation_type": feed_forward.activation,
        "mlp_type": feed_forward.kind, "mlp_bias": feed_forward.bias, "layer_norm_type": network.norm.kind,
        "n_kv_head": "fewer" if attention.num_kv_heads < attention.num_heads else "all",
        **{key: getattr(attention, key) for key in BIASES},
    }  # fmt: skip


@cache
def proved() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Return proved pairs: by part of the network, "key value" and second key, the second's values joined by spaces."""
    text = resources.files("u2moe.export").joinpath(FILE).read_text(encoding="utf-8")
    table: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return table


def check_proved(file: str | PathLike[str], architecture: Architecture) -> None:
    """Raise UnsupportedError if a pair of settings occurs in no network that was compared with WeNet."""
    for part, found in settings(architecture).items():
        for (key, value), (other, wanted) in combinations(found, 2):
            if wanted not in proved()[part].get(f"{key} {value}", {}).get(other, "").split():
                raise UnsupportedError(
                    f"{file}: {part} with {key} {value} and {other} {wanted} is not proved equal to WeNet: "
                    "no network with both has been compared with WeNet's output"
                )
