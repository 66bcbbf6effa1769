"""The measurements behind the choice of a bundle's expert kernels, and the machine. Data, validation, and a table."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnxruntime

from u2moe.quantize.tuning.machine import cpu_fields, instruction_sets, processor
from u2moe.quantize.tuning.measurement import Spread
from u2moe.runtime.model.native import CPU, checked_kernels, choose_kernels


@dataclass(frozen=True, kw_only=True)
class TunedExperts:
    """The experts of one graph.

    Attributes:
        chosen: the chosen format.
        tokens: "speech": the layers' inputs for real speech; or "random": tokens that use nearly all experts.
        num_layers: number of layers that took turns.
        shares: share of the audio by tokens per call, which weights the times.
        times_ms: milliseconds of one layer, by format and tokens per call.
        errors: relative error of a layer's output against float32, by format.
        refused: the reason why a format was excluded and not timed, by format.
    """

    chosen: str
    tokens: Literal["speech", "random"]
    num_layers: int
    shares: dict[str, float]
    times_ms: dict[str, dict[str, Spread]]
    errors: dict[str, float]
    refused: dict[str, str]

    def __post_init__(self) -> None:
        if self.chosen not in self.times_ms:
            measured = ", ".join(self.times_ms) or "those that were measured"
            raise ValueError(f"chosen must be one of {measured}, got {self.chosen!r}")
        if self.tokens not in ("speech", "random"):
            raise ValueError(f"tokens must be 'speech' or 'random', got {self.tokens!r}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        for tokens, share in self.shares.items():
            if not tokens.isdecimal() or int(tokens) < 1 or not 0 <= share <= 1:
                raise ValueError(f"shares must be from 0 to 1, by tokens per call, got {share} of {tokens!r}")
        if not math.isclose(sum(self.shares.values()), 1, rel_tol=1e-6):
            raise ValueError(f"shares must sum to 1, got {sum(self.shares.values())}")
        for kind, times in self.times_ms.items():
            if times.keys() != self.shares.keys():
                raise ValueError(
                    f"times_ms of {kind} must be of {', '.join(self.shares)} tokens, got {', '.join(times)}"
                )
            for tokens, found in times.items():
                if not 0 < found.low <= found.median <= found.high < math.inf or found.count < 1:
                    raise ValueError(f"times_ms of {kind}, {tokens} tokens, must be times that rise, got {found}")
            if not 0 <= self.errors.get(kind, math.nan) < math.inf:
                raise ValueError(f"errors of {kind} must be at least 0, got {self.errors.get(kind)}")

    def ms_per_token(self, kind: str) -> float:
        """Milliseconds of one layer per token, averaged over all audio."""
        return sum(share * self.times_ms[kind][tokens].median / int(tokens) for tokens, share in self.shares.items())


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The machine of the measurements, and the choice for each graph with experts.

    `kernels` are the native kernels that took part, with their instruction set; "none", or None if it is not known.
    """

    processor: str
    instruction_sets: str
    onnxruntime: str
    num_threads: int
    date: str
    graphs: dict[str, TunedExperts]
    kernels: str | None = None

    def __post_init__(self) -> None:
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {self.num_threads}")
        if not self.graphs:
            raise ValueError("graphs must be at least one, got none")
        try:
            dt.date.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"date must be like 2026-01-31, got {self.date!r}") from error

    @classmethod
    def here(cls, graphs: dict[str, TunedExperts], num_threads: int) -> Tuning:
        """A record of measurements made on this machine today."""
        fields = cpu_fields()
        kernels = choose_kernels(checked_kernels(None), [CPU])
        return cls(
            processor=processor(fields),
            instruction_sets=" ".join(instruction_sets(fields)),
            onnxruntime=onnxruntime.__version__,
            num_threads=num_threads,
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            graphs=graphs,
            kernels=f"u2moe-kernels {kernels.version} ({kernels.isa})" if kernels.native else "none",
        )

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Tuning:
        """Parse what `data` returned.

        Raises:
            ValueError: not such a record, or a damaged one.
        """
        try:
            graphs = {name: _experts_from(dict(item)) for name, item in data["graphs"].items()}
            return cls(**{**data, "graphs": graphs})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"fields are not those of a tuning record: {error}") from error

    def data(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return asdict(self)

    def differences(self) -> list[str]:
        """Differences from this machine; if there are none, the measurements hold here."""
        here = Tuning.here(self.graphs, self.num_threads)
        pairs = {
            "processor": (self.processor, here.processor),
            "instruction sets": (self.instruction_sets, here.instruction_sets),
            "onnxruntime": (self.onnxruntime, here.onnxruntime),
            "native kernels": (self.kernels or here.kernels, here.kernels),  # older records do not say
        }
        return [f"{name} {found}, here {own}" for name, (found, own) in pairs.items() if found != own]


def _experts_from(item: dict[str, Any]) -> TunedExperts:
    times = item.pop("times_ms")
    spreads = {kind: {tokens: Spread(**found) for tokens, found in own.items()} for kind, own in times.items()}
    return TunedExperts(**item, times_ms=spreads)


def describe_record(record: Mapping[str, Any]) -> str:
    """`describe` for a record as stored in a manifest; a single line if it cannot be read."""
    try:
        return describe(Tuning.from_data(record))
    except ValueError as error:
        return f"tuned, but the record cannot be read: {error}"


def describe(tuning: Tuning) -> str:
    """The machine, whether it is the present one, and a table for each graph."""
    threads = "1 thread" if tuning.num_threads == 1 else f"{tuning.num_threads} threads"
    differences = tuning.differences()
    sets = tuning.instruction_sets or "unknown instruction sets"
    where = (
        f"elsewhere: {'; '.join(differences)}; tune again to know what is fastest here"
        if differences
        else "this machine"
    )
    software = f"onnxruntime {tuning.onnxruntime}, {threads}, {tuning.date}"
    lines = [f"tuned on {tuning.processor} with {sets}, {software} ({where})"]
    for name, experts in tuning.graphs.items():
        inputs = {"speech": "tokens of speech", "random": "random tokens"}[experts.tokens]
        lines += [
            f"experts of {name}: {experts.chosen}; ms per layer, {experts.num_layers} layers in turn on {inputs}",
            *_rows(experts),
        ]
    return "\n".join(lines)


def _rows(experts: TunedExperts) -> list[str]:
    """Lines of a table, one per format, with medians and quartiles; the chosen one is marked."""
    head = ["tokens per call", *experts.shares, "us per token", "error"]
    shares = ["share of audio", *(f"{share:.1%}" for share in experts.shares.values()), "", ""]
    body = []
    for kind, times in experts.times_ms.items():
        cells = [f"{found.median:.3f} ({found.low:.3f}-{found.high:.3f})" for found in times.values()]
        mark = "> " if kind == experts.chosen else "  "
        body.append([mark + kind, *cells, f"{1e3 * experts.ms_per_token(kind):.2f}", f"{experts.errors[kind]:.2%}"])
    table = [head, shares, *body]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *others = (
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)).rstrip())
    return [*lines, *(f"  {kind} not chosen: {reason}" for kind, reason in experts.refused.items())]
