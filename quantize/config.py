"""What to quantize, and how: recipes as data, checked at birth. Knows no graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from u2moe.runtime.contract import WEIGHT_GROUPS

FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "experts": ("fp32", "int8", "int4"),
        "feed_forward": ("fp32", "int8"),
        "attention": ("fp32", "int8"),
        "subsampling": ("fp32", "int8"),
        "pointwise_convolutions": ("fp32", "int8"),
        "embeddings": ("fp32", "int8"),
        "output_layers": ("fp32", "int8"),
    }
)
"""Formats that each group of weights can have. Routers, biases, norms and depthwise convolutions are always fp32."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A format for each group of weights; groups that are not named stay fp32.

    Attributes:
        name: as recorded in the manifest.
        groups: format by group, see `FORMATS`.
        block_size: rows of a weight that share one scale in int4.
        whole: "fp16" turns everything but the routers and positions into half precision (for CUDA) and excludes
            `groups`; None: only what `groups` says.
        required: groups that were asked for by name: a network that lacks one is an error.
        skip_expert_below: a token skips those of its experts whose normalised weight is below this, but never the
            likeliest; the weights of the others are normalised again, so that a token that skips its second of two
            goes to the first alone with weight 1. 0: none is skipped. Faster, at the price of words.
    """

    name: str
    groups: Mapping[str, str] = field(default_factory=dict)
    block_size: int = 32
    whole: str | None = None
    required: tuple[str, ...] = ()
    skip_expert_below: float = 0.0

    def __post_init__(self) -> None:
        for group, kind in self.groups.items():
            if group not in FORMATS:
                known = ", ".join(FORMATS)
                extra = " (always fp32)" if group in WEIGHT_GROUPS else ""
                raise ValueError(f"groups: {group!r}{extra} cannot be quantized; groups are {known}")
            if kind not in FORMATS[group]:
                raise ValueError(f"groups: {group} must be one of {', '.join(FORMATS[group])}, got {kind!r}")
        if self.block_size not in (16, 32, 64, 128):
            raise ValueError(f"block_size must be 16, 32, 64 or 128, got {self.block_size}")
        if self.whole not in (None, "fp16"):
            raise ValueError(f"whole must be 'fp16' or None, got {self.whole!r}")
        if self.whole and self.groups:
            raise ValueError("whole and groups exclude each other")
        if not 0 <= self.skip_expert_below <= 1:
            raise ValueError(f"skip_expert_below must be from 0 to 1, got {self.skip_expert_below}")
        if not self.whole and not self.quantized and not self.skip_expert_below:
            raise ValueError(f"recipe {self.name!r} quantizes nothing")

    @property
    def quantized(self) -> dict[str, str]:
        """The groups that do not stay fp32."""
        return {group: kind for group, kind in self.groups.items() if kind != "fp32"}

    def replaced(self, groups: Mapping[str, str], *, skip_expert_below: float = 0.0) -> Recipe:
        """This recipe with other formats for some groups and skipped experts, and a name that says so."""
        changes = [f"{group}={kind}" for group, kind in sorted(groups.items())]
        changes += [f"skip_expert_below={skip_expert_below:g}"] if skip_expert_below else []
        if not changes:
            return self
        return replace(
            self,
            name=f"{self.name}[{','.join(changes)}]",
            groups={**self.groups, **groups},
            required=tuple(group for group, kind in groups.items() if kind != "fp32"),
            skip_expert_below=skip_expert_below,
        )


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(name="int8", groups=dict.fromkeys(FORMATS, "int8")),
            Recipe(name="int8-experts", groups={"experts": "int8"}),
            Recipe(name="int4-experts", groups={**dict.fromkeys(FORMATS, "int8"), "experts": "int4"}),
            Recipe(name="fp16", whole="fp16"),
        )
    }
)


FLOAT32 = "fp32"
"""Name of what quantizes nothing: a recipe only with another format for some group, or with skipped experts."""


def recipe(name: str, groups: Mapping[str, str] | None = None, *, skip_expert_below: float = 0.0) -> Recipe:
    """The recipe of that name, with other formats for some groups, and with skipped experts.

    Raises:
        ValueError: no such recipe, group or format; a recipe that changes nothing.
    """
    changes = groups or {}
    if name == FLOAT32:
        plain = Recipe(name=name, groups=changes, skip_expert_below=skip_expert_below)
        return plain.replaced(changes, skip_expert_below=skip_expert_below)
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join((*RECIPES, FLOAT32))}, got {name!r}")
    return RECIPES[name].replaced(changes, skip_expert_below=skip_expert_below)
