"""Recipes, the number format of each group of weights, and goals, as validated data. Independent of graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from u2moe.runtime.bundle.contract import WEIGHT_GROUPS
from u2moe.runtime.bundle.weight_formats import FLOAT32, HALF, MATRICES, WEIGHT_FORMATS
from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.validation import checked_choice

FORMATS: Mapping[str, tuple[str, ...]] = {
    group: tuple(name for name, kind in WEIGHT_FORMATS.items() if group in kind.groups) for group in MATRICES
}
"""Formats for each group of weights, the best first. Routers, biases, norms and depthwise convolutions are always fp32.
In int4, the convolutions of the front end, which have few weights, are int8."""
BLOCK_SIZES = tuple(sorted({size for kind in WEIGHT_FORMATS.values() for size in kind.block_sizes}))
_INTEGERS = " and ".join(name for name, kind in WEIGHT_FORMATS.items() if kind.bits < HALF.bits)
LONGEST_S = 900  # maximum duration of calibration audio in seconds; the rest is not read


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A number format for each group of weights. Groups that are not named stay fp32.

    Attributes:
        name: name recorded in the manifest.
        groups: format by group, see `FORMATS`.
        block_size: number of rows of a weight that share one step, in formats with a step per block.
        whole: "fp16" converts everything except routers and positions to half precision (for CUDA) and cannot be
            combined with `groups`; None: only `groups` are converted.
        required: groups that were requested by name; the network must have all of them.
        packed: write weights in the layout of the native kernels, which map them from the file. The bundle cannot be
            loaded without these kernels, and its files must not change in place while it is loaded.
        calibration: audio files for two methods. SmoothQuant moves large activation channels into the weights, and GPTQ
            minimises the output error of products. Empty: each weight is rounded to the nearest value.
        exceptions: formats of single layers, by the names that `layer_of` returns. A layer with the format "fp16" is
            stored as float16 and computes in float32.
    """

    name: str
    groups: Mapping[str, str] = field(default_factory=dict)
    block_size: int = 32
    whole: str | None = None
    required: tuple[str, ...] = ()
    packed: bool = False
    calibration: tuple[Path, ...] = ()
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, kind in self.groups.items():
            if group not in FORMATS:
                known = ", ".join(FORMATS)
                extra = " (always fp32)" if group in WEIGHT_GROUPS else ""
                raise ValueError(f"groups: {group!r}{extra} cannot be quantized; groups are {known}")
            checked_choice(f"groups: {group}", kind, FORMATS[group])
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}")
        if self.whole is not None:
            checked_choice("whole", self.whole, (HALF.name,))
        for name in ("groups", "packed", "calibration"):
            if self.whole and getattr(self, name):
                raise ValueError(f"{name} applies only to weights in {_INTEGERS}, but this recipe uses {self.whole}")
        if not self.whole and not self.quantized and not self.exceptions:
            raise ValueError(f"recipe {self.name!r} quantizes nothing")
        for layer, kind in self.exceptions.items():
            checked_choice(f"exceptions: {layer}", kind, WEIGHT_FORMATS)

    def format_of(self, layer: str, group: str) -> str:
        """Return the weight format of `layer`, which belongs to `group`."""
        wanted = self.exceptions.get(layer, self.groups.get(group, FLOAT32.name))
        return wanted if wanted in FORMATS.get(group, ()) else FLOAT32.name

    @property
    def quantized(self) -> dict[str, str]:
        """Formats of the groups that do not stay fp32, by group."""
        return {group: kind for group, kind in self.groups.items() if kind != FLOAT32.name}


RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (
    Recipe(name="int8", groups=dict.fromkeys(FORMATS, "int8")),
    Recipe(name="int8-experts", groups={"experts": "int8"}),
    Recipe(name="int4-experts", groups=dict.fromkeys(FORMATS, "int8") | {"experts": "int4"}, required=("experts",)),
    Recipe(name="int4", groups=dict.fromkeys(FORMATS, "int4") | {"output_layers": "int8"}),
    Recipe(name="fp16", whole="fp16"),
)}  # fmt: skip
NO_RECIPE = FLOAT32.name  # name of the empty recipe, which is valid only with a format for at least one group or layer


def recipe(
    name: str,
    groups: Mapping[str, str] | None = None,
    *,
    packed: bool = False,
    calibration: Sequence[Path] = (),
    exceptions: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the recipe of that name. `groups` changes its formats; the other arguments are fields of `Recipe`.

    Raises:
        ValueError: the recipe, a group or a format is unknown, or the recipe changes nothing.
    """
    checked_choice("recipe", name, (*RECIPES, NO_RECIPE))
    base = RECIPES.get(name)
    if base is not None and not (groups or packed or calibration or exceptions):
        return base
    changes = dict(groups or {})
    suffix = ",".join(f"{group}={kind}" for group, kind in sorted(changes.items()))
    return Recipe(
        name=f"{name}[{suffix}]" if suffix else name,
        groups={**(base.groups if base else {}), **changes},
        whole=base.whole if base else None,
        packed=packed,
        calibration=tuple(calibration),
        exceptions=dict(exceptions or {}),
        required=(*(base.required if base else ()), *(group for group, kind in changes.items() if kind != NO_RECIPE)),
    )


@dataclass(frozen=True, kw_only=True)
class Goal(Checked):
    """Limits for a quantized bundle.

    With a limit on damage, the smallest bundle within all limits is chosen; otherwise the one with the least damage.

    Attributes:
        max_damage: limit on `Difference.changed_tokens`, measured on recordings that are not used to choose
            formats (0.005: 0.5 %). The upper end of its confidence interval must not exceed the limit.
        max_divergence: limit on `Difference.divergence` on the same recordings, in nats per encoder frame. The upper
            end of its confidence interval must not exceed the limit.
        max_wer_increase: limit on the increase of the word error rate on recordings with transcripts (0.005: half a
            percentage point).
        max_bytes: limit on the size of the bundle.
        target_rtf: limit on the encoder's time per second of audio, with one thread on this machine.
        resume: until the new bundle is complete, keep measurements in a file next to it, and reuse those of an
            interrupted run.
    """

    max_damage: float | None = option("number", None, above=0, most=1)
    max_divergence: float | None = option("number", None, above=0)
    max_wer_increase: float | None = option("number", None)
    max_bytes: float | None = option("number", None, above=0)
    target_rtf: float | None = option("number", None, above=0)
    resume: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """All limits."""
        return {name: value for name, value in vars(self).items() if name != "resume" and value is not None}

    @property
    def searched(self) -> dict[str, float]:
        """Limits that are met by choosing each layer's format according to the damage that the formats cause."""
        return {name: value for name, value in self.limits.items() if name != "max_wer_increase"}
