"""What to quantize, and how: recipes as data, checked at birth. Knows no graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """

    name: str
    groups: Mapping[str, str] = field(default_factory=dict)
    block_size: int = 32
    whole: str | None = None
    required: tuple[str, ...] = ()

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
        if not self.whole and not self.quantized:
            raise ValueError(f"recipe {self.name!r} quantizes nothing")

    @property
    def quantized(self) -> dict[str, str]:
        """The groups that do not stay fp32."""
        return {group: kind for group, kind in self.groups.items() if kind != "fp32"}

    def replaced(self, groups: Mapping[str, str]) -> Recipe:
        """This recipe with other formats for some groups, and a name that says so."""
        if not groups:
            return self
        changes = ",".join(f"{group}={kind}" for group, kind in sorted(groups.items()))
        return Recipe(
            name=f"{self.name}[{changes}]",
            groups={**self.groups, **groups},
            block_size=self.block_size,
            whole=self.whole,
            required=tuple(group for group, kind in groups.items() if kind != "fp32"),
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


def recipe(name: str, groups: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of that name, with other formats for some groups.

    Raises:
        ValueError: no such recipe, group or format.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name].replaced(groups or {})
