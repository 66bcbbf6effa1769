"""The encoders by WeNet's names. To add one, add a module beside this one and an entry in `KINDS`."""

from collections.abc import Callable
from dataclasses import dataclass

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.encoders import branchformer as branch
from u2moe.export.encoders import conformer, squeezeformer
from u2moe.export.encoders import efficient_conformer as efficient
from u2moe.export.encoders.network import EncoderBlock, SpeechEncoder
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.encoders.squeezeformer_nodes import SqueezeformerNodes
from u2moe.export.text_files import Section


@dataclass(frozen=True)
class Kind:
    """A kind of encoder: its reader for train.yaml, its blocks, the builder of its graph layers, and its network."""

    read: Callable[[Section], EncoderArchitecture]
    block: type[EncoderBlock]
    nodes: type[EncoderNodes]
    network: type[SpeechEncoder] = SpeechEncoder


KINDS = {
    "efficientConformer": Kind(efficient.read, efficient.EfficientBlock, efficient.EfficientConformerNodes),
    "squeezeformer": Kind(
        squeezeformer.read, squeezeformer.SqueezeformerBlock, SqueezeformerNodes, squeezeformer.SqueezeformerEncoder
    ),
    "branchformer": Kind(branch.read_branchformer, branch.BranchformerBlock, branch.BranchformerNodes),
    "e_branchformer": Kind(branch.read_e_branchformer, branch.EBranchformerBlock, branch.EBranchformerNodes),
    "conformer": Kind(conformer.read, conformer.ConformerBlock, conformer.ConformerNodes),
    "transformer": Kind(conformer.read_transformer, conformer.TransformerBlock, conformer.ConformerNodes),
}
# WeNet's `ctl_model` trains these encoders on whole utterances and on chunks at once, with unchanged layers
KINDS |= {f"dual_{name}": KINDS[name] for name in ("conformer", "transformer")}
