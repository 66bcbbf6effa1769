"""The encoders by WeNet's names. To add one, add a module beside this one and an entry in `KINDS`."""

from collections.abc import Callable
from dataclasses import dataclass

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.encoders import branchformer, conformer, e_branchformer, efficient_conformer, squeezeformer
from u2moe.export.encoders.network import SpeechEncoder
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.encoders.squeezeformer_nodes import SqueezeformerNodes
from u2moe.export.yaml_section import Section


@dataclass(frozen=True)
class Kind:
    """A kind of encoder: its reader for train.yaml, its torch network, and the class that builds its graph layers."""

    read: Callable[[Section], EncoderArchitecture]
    network: type[SpeechEncoder]
    nodes: type[EncoderNodes]


KINDS = {
    "efficientConformer": Kind(
        efficient_conformer.read,
        efficient_conformer.EfficientConformerEncoder,
        efficient_conformer.EfficientConformerNodes,
    ),
    "squeezeformer": Kind(squeezeformer.read, squeezeformer.SqueezeformerEncoder, SqueezeformerNodes),
    "branchformer": Kind(branchformer.read, branchformer.BranchformerEncoder, branchformer.BranchformerNodes),
    "e_branchformer": Kind(e_branchformer.read, e_branchformer.EBranchformerEncoder, e_branchformer.EBranchformerNodes),
    "conformer": Kind(conformer.read, conformer.ConformerEncoder, conformer.ConformerNodes),
    "transformer": Kind(conformer.read_transformer, conformer.TransformerEncoder, conformer.ConformerNodes),
}
# WeNet's `ctl_model` trains these encoders on whole utterances and on chunks at once, with unchanged layers
KINDS |= {f"dual_{name}": KINDS[name] for name in ("conformer", "transformer")}
