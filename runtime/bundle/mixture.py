"""Description of a mixture of experts, stored as attributes of the graph node that calls it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.validation import checked_choice, checked_integer

_LAYER = "MixtureOfExperts"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Settings of a mixture of experts, without the sizes of its weights.

    Attributes:
        num_experts: number of experts.
        top_k: experts per token.
        activation: activation between the two products of an expert, such as "swish".
        bias: whether the products have biases.
        weights: format of the experts' weights, one of `WEIGHT_FORMATS`.
        block_size: input rows of a weight that share a scale; 0: one scale per column, or none.
    """

    num_experts: int
    top_k: int
    activation: str
    bias: bool = True
    weights: str = "fp32"
    block_size: int = 0

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
    """Return the mixture of experts that a node calls, or None if it calls something else.

    Args:
        domain: domain of the node.
        op_type: operator of the node.
        attributes: attributes of the node, as plain values (strings may be bytes).

    Raise ValueError if attributes of the mixture of experts are missing or invalid.
    """
    if domain != MOE_DOMAIN or _LAYER not in op_type:
        return None
    try:
        return Mixture(
            num_experts=int(attributes["num_experts"]), top_k=int(attributes["top_k"]),
            activation=_text(attributes["activation"]), bias=bool(attributes["bias"]),
            weights=_text(attributes["weights"]), block_size=int(attributes["block_size"]),
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{op_type}: attribute {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{op_type}: {error}") from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
