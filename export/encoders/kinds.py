"""The encoders by WeNet's names. To add one, add a module beside this one and an entry in `KINDS`."""

from collections.abc import Callable
from dataclasses import dataclass

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.encoders import branchformer as branch
from u2moe.export.encoders import conformer, squeezeformer
from u2moe.export.encoders import efficient_conformer as efficient
from u2moe.export.encoders.network import SpeechEncoder
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.encoders.squeezeformer_nodes import SqueezeformerNodes
from u2moe.export.text_files import Section


@dataclass(frozen=True)
class Kind:
    """A kind of encoder: its reader for train.yaml, its torch network, and the class that builds its graph layers."""

    read: Callable[[Section], EncoderArchitecture]
    network: type[SpeechEncoder]
    nodes: type[EncoderNodes]


KINDS = {
    "efficientConformer": Kind(efficient.read, efficient.EfficientConformerEncoder, efficient.EfficientConformerNodes),
    "squeezeformer": Kind(squeezeformer.read, squeezeformer.SqueezeformerEncoder, SqueezeformerNodes),
    "branchformer": Kind(branch.read_branchformer, branch.BranchformerEncoder, branch.BranchformerNodes),
    "e_branchformer": Kind(branch.read_e_branchformer, branch.EBranchformerEncoder, branch.EBranchformerNodes),
    "conformer": Kind(conformer.read, conformer.ConformerEncoder, conformer.ConformerNodes),
    "transformer": Kind(conformer.read_transformer, conformer.TransformerEncoder, conformer.ConformerNodes),
}
# WeNet's `ctl_model` trains these encoders on whole utterances and on chunks at once, with unchanged layers
KINDS |= {f"dual_{name}": KINDS[name] for name in ("conformer", "transformer")}
