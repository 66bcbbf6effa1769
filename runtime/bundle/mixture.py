"""Description of a mixture of experts, stored as attributes of the graph node that calls it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.validation import checked_choice, checked_integer, refused_as

_LAYER = "MixtureOfExperts"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Settings of a mixture of experts, without the sizes of its weights."""

    num_experts: int
    top_k: int  # experts per token
    activation: str  # between the two products of an expert, such as "swish"
    bias: bool = True  # whether the products have biases
    weights: str = "fp32"  # format of the experts' weights, one of `WEIGHT_FORMATS`
    block_size: int = 0  # input rows of a weight that share a scale; 0: one scale per column, or none

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts ({self.num_experts}), got {self.top_k}")
        if not self.activation:
            raise ValueError("activation must not be empty")
        checked_choice("weights", self.weights, WEIGHT_FORMATS)
        checked_integer("block_size", self.block_size, least=0)

    @property
    def function(self) -> str:
        """Name of the function in `MOE_DOMAIN`. If a graph has several such functions, later names end in a number."""
        return WEIGHT_FORMATS[self.weights].function(_LAYER)

    def attributes(self) -> dict[str, int | str]:
        """Return the attributes of the node that calls the mixture."""
        return {**asdict(self), "bias": int(self.bias)}


def read_mixture(domain: str, op_type: str, attributes: Mapping[str, Any]) -> Mixture | None:
    """Return the mixture that a node calls; None: it calls something else. Raises ValueError for wrong attributes."""
    if domain != MOE_DOMAIN or _LAYER not in op_type:
        return None
    kinds = get_type_hints(Mixture)
    with refused_as(ValueError, op_type):
        if missing := [name for name in kinds if name not in attributes]:
            raise ValueError(f"attribute {missing[0]!r} is missing")
        return Mixture(**{name: kind(attributes[name]) for name, kind in kinds.items()})
