"""The pairs of settings of which a network has been compared with WeNet's own code; what has other pairs is refused.

`proved.json` lists them: tests/golden/configurations/pairs.py writes it from the golden outputs of WeNet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from itertools import combinations
from os import PathLike

from u2moe.export.architecture import Architecture, Attention, Decoder, EncoderArchitecture
from u2moe.runtime.errors import UnsupportedError

FILE = "proved.json"
Setting = tuple[str, str]
"""A key of encoder_conf or decoder_conf (or `encoder`, `decoder`), and its value."""
OWN = {
    "merge": "merge_method",
    "linear": "use_linear_after_conv",
    "activation": "gate_activation",
    "feed_forward": "use_ffn",
    "reduction": "time_reduction_layer_type",
    "adaptive": "adaptive_scale",
    "shifted": "do_rel_shift",
    "depthwise_subsampling": "dw_stride",
}
"""Settings of one kind of encoder alone, by the field that holds them."""


def settings(architecture: Architecture) -> dict[str, list[Setting]]:
    """What a network is made of, for its encoder and, if it has one, its decoder: all choices, and no sizes."""
    found = {"encoder": dict(_of_encoder(architecture.encoder))}
    if architecture.left_decoder is not None:
        kind = "transformer" if architecture.right_decoder is None else "bitransformer"
        found["decoder"] = {"decoder": kind, **dict(_of_decoder(architecture.left_decoder))}
    return {part: [(key, _text(value)) for key, value in own.items()] for part, own in found.items()}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_encoder(encoder: EncoderArchitecture) -> Iterator[tuple[str, object]]:
    yield "encoder", encoder.kind
    yield "input_layer", encoder.subsampling
    yield "pos_enc_layer_type", encoder.positions
    yield "selfattention_layer_type", _attention_kind(encoder.attention)
    yield from _of_layers(encoder)
    yield "macaron_style", encoder.macaron
    yield "final_norm", encoder.final_norm
    yield "chunks", "any" if encoder.dynamic_chunk else "fixed" if encoder.static_chunk_size else "none"
    yield from _of_attention(encoder.attention)
    convolution, gating = encoder.convolution, getattr(encoder.own, "gating", None)
    if gating is not None:
        yield "causal", gating.causal
    else:
        yield "cnn_module_norm", "none" if convolution is None else convolution.norm.kind
    if convolution is not None:
        yield "causal", convolution.causal
        yield "conv_bias", convolution.bias
    for values in filter(None, (encoder.own, gating)):
        for field in dataclasses.fields(values):
            if field.name in OWN:
                yield OWN[field.name], getattr(values, field.name)


def _of_decoder(decoder: Decoder) -> Iterator[tuple[str, object]]:
    yield "input_layer", "embed_learnable_pe" if decoder.learned_positions else "embed"
    yield from _of_layers(decoder)
    yield from _of_attention(decoder.self_attention)
    for key in ("query_bias", "key_bias", "value_bias"):
        yield f"src_{key}", getattr(decoder.cross_attention, key)


def _of_layers(part: EncoderArchitecture | Decoder) -> Iterator[tuple[str, object]]:
    yield "normalize_before", part.pre_norm
    yield "activation_type", part.feed_forward.activation
    yield "mlp_type", part.feed_forward.kind
    yield "mlp_bias", part.feed_forward.bias
    yield "layer_norm_type", part.norm.kind


def _of_attention(attention: Attention) -> Iterator[tuple[str, object]]:
    yield "n_kv_head", "fewer" if attention.num_kv_heads < attention.num_heads else "all"
    for key in ("query_bias", "key_bias", "value_bias"):
        yield key, getattr(attention, key)


def _attention_kind(attention: Attention) -> str:
    if attention.rotary:
        return "rope_abs_selfattn"
    if attention.by_distance:
        return "shaw_rel_selfattn"
    return "rel_selfattn" if attention.relative else "selfattn"


@cache
def proved() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """By part of the network and by the first setting, "key value": the values of each later key, with spaces."""
    text = resources.files("u2moe.export").joinpath(FILE).read_text(encoding="utf-8")
    table: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return table


def check_proved(file: str | PathLike[str], architecture: Architecture) -> None:
    """Refuse a network with a pair of settings of which none has been compared with WeNet.

    Raises:
        UnsupportedError: names `file` and the pair.
    """
    for part, found in settings(architecture).items():
        for (key, value), (other, wanted) in combinations(found, 2):
            if wanted not in proved()[part].get(f"{key} {value}", {}).get(other, "").split():
                raise UnsupportedError(
                    f"{file}: {part} with {key} {value} and {other} {wanted} is not proved equal to WeNet: "
                    "no network with both has been compared with what WeNet computes"
                )
