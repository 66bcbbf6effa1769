"""Reproduces the networks of WeNet's old releases.

The release is identified by the tensors of the checkpoint and by the layout of train.yaml.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from u2moe.export.architecture import Architecture, Decoder
from u2moe.export.training_config import TrainingConfig
from u2moe.export.weights import CONCATENATION
from u2moe.runtime.errors import CheckpointError

OLD_EPS = 1e-12
"""Epsilon of all layer normalisations except in convolution modules, until WeNet's commit 6d574b39 (January 2022)."""
KINDS = ("conformer", "transformer")
"""The encoders of the old releases; Squeezeformers and others came later."""
POSITION_WEIGHT = "encoder.encoders.0.self_attn.linear_pos.weight"


def as_trained(path: Path, config: TrainingConfig, state: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture as built by the WeNet release that wrote this train.yaml and state dict.

    Until 2023 a conformer's `selfattention_layer_type` had no effect. Attention was relative with `rel_pos` (until
    2022, also with `abs_pos`); otherwise it was plain.

    Raises:
        CheckpointError: two releases with different epsilons could have written these files.
    """
    architecture = config.architecture
    encoder = architecture.encoder
    if config.layout == "present" or encoder.kind not in KINDS:
        return architecture
    if encoder.kind == "conformer" and (POSITION_WEIGHT in state or encoder.positions != "rel_pos"):
        encoder = replace(encoder, attention=replace(encoder.attention, relative=POSITION_WEIGHT in state))
    decoders = architecture.left_decoder, architecture.right_decoder
    unstated = {"encoder_conf", *(["decoder_conf"] if any(decoders) else [])} - config.stated_eps
    if config.layout == "dataset_conf":
        if unstated and any(CONCATENATION.fullmatch(name) for name in state):
            raise CheckpointError(
                f"{path}: the eps of its layer normalisations is unknown: the file was written between September "
                "2021 and May 2022. "
                f"WeNet used {OLD_EPS:g} until January 2022 (commit 6d574b39) and 1e-05 since. Add "
                f"norm_eps: 1.0e-12 or norm_eps: 1.0e-5 to {' and '.join(sorted(unstated))} of train.yaml"
            )
        unstated = set()
    if "encoder_conf" in unstated:
        encoder = replace(encoder, norm=replace(encoder.norm, eps=OLD_EPS))
    if "decoder_conf" in unstated:
        decoders = _old(decoders[0]), _old(decoders[1])
    encoder = replace(encoder, embed_eps=encoder.norm.eps)
    return replace(architecture, encoder=encoder, left_decoder=decoders[0], right_decoder=decoders[1])


def _old(decoder: Decoder | None) -> Decoder | None:
    return None if decoder is None else replace(decoder, norm=replace(decoder.norm, eps=OLD_EPS))
