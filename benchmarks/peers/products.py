"""How fast do other libraries multiply the experts of one layer? oneDNN, torch and QMoE beside ours.

    python -m u2moe.benchmarks.peers.products [--results products.json] [--tokens 1 4 16 64 250]

The layer is that of `full_size.moe_layer`, with weights that no cache holds. QMoE and ours are whole layers. oneDNN and
torch are bare products, with the mean number of rows per expert and without routing, rounding and activations, times
the number of experts with tokens; torch's int8 leaves out scales, too. oneDNN's program is built where g++ and the
library (Debian's libdnnl-dev) are there, and left out otherwise. All take turns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from u2moe.benchmarks.full_size.moe_layer import Layer, Layers, layer_parser, layer_session, moe_graph, random_tokens
from u2moe.benchmarks.full_size.moe_layer_page import INT4, INT8, LAYER_BYTES
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, mean_seconds, spread_of
from u2moe.benchmarks.peers.graphs import use_qmoe
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script
from u2moe.runtime.model.native import CPU, choose_kernels

Array = npt.NDArray[Any]
Seconds = Callable[[], float]
TOKENS = (1, 4, 16, 64, 250)
BLOCK_SIZE = 32
"""Of int4, ours and torch's."""
SOURCE = Path(__file__).with_name("onednn.cpp")
CALL_S = 0.03
"""Minimum seconds of one measurement."""


class TorchProducts:
    """Both products of experts by torch's integer kernels; `bits` 8: `_int_mm`, 4: `_weight_int4pack_mm_for_cpu`."""

    def __init__(self, sizes: Layer, bits: int, copies: int) -> None:
        self.bits = bits
        shapes = ((sizes.dim, sizes.hidden), (sizes.hidden, sizes.dim))
        self.shapes = shapes
        self.weights = [[self._weight(*shape) for shape in shapes] for _ in range(copies)]

    def _weight(self, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
        if self.bits == 8:
            return (torch.randint(-127, 128, (rows, columns), dtype=torch.int8),)
        integers = torch.randint(0, 16, (columns, rows), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 2)  # noqa: SLF001 - there is no other name
        return packed, torch.ones(-(-rows // BLOCK_SIZE), columns, 2, dtype=torch.bfloat16)

    def seconds(self, num_rows: int) -> float:
        """Seconds of one expert with that many rows."""
        kind = torch.int8 if self.bits == 8 else torch.bfloat16
        inputs = [torch.ones(num_rows, rows, dtype=kind) for rows, _ in self.shapes]

        def run() -> None:
            for pair in self.weights:
                for x, weight in zip(inputs, pair, strict=True):
                    if self.bits == 8:
                        torch._int_mm(x, weight[0])  # noqa: SLF001
                    else:
                        torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], BLOCK_SIZE, weight[1])  # noqa: SLF001

        with torch.inference_mode():
            return mean_seconds(run, CALL_S) / len(self.weights)


class WholeLayers:
    """Layers in onnxruntime's QMoE."""

    def __init__(self, sizes: Layer, bits: int, num_bytes: int, num_threads: int) -> None:
        per_layer = sizes.num_experts * sizes.multiply_adds * bits // 8
        self.count = max(1, -(-num_bytes // per_layer))
        model = moe_graph(sizes, self.count)
        use_qmoe(model, bits)
        self.session = layer_session(model, num_threads)

    def seconds(self, x: Array) -> float:
        """Seconds of one layer for the tokens [tokens, dim]."""
        return mean_seconds(lambda: self.session.run(None, {"x": x}), CALL_S) / self.count


def built_onednn(folder: Path) -> Path | None:
    """The program, or None where it cannot be built."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    program = folder / "onednn"
    command = [compiler, "-O2", "-std=c++17", str(SOURCE), "-o", str(program), "-ldnnl"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - the compiler
    return program if done.returncode == 0 else None


def onednn_seconds(program: Path, sizes: Layer, copies: int, num_threads: int, num_rows: int) -> float:
    """Seconds of one expert with that many rows."""
    command = [str(program), *(str(number) for number in (num_rows, sizes.dim, sizes.hidden, copies))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603 - ourselves
    return float(done.stdout)


class Engines:
    """All that can be had here, each as a function from tokens [tokens, dim] to seconds of a layer."""

    def __init__(self, sizes: Layer, num_bytes: int, num_threads: int, folder: Path) -> None:
        torch.set_num_threads(num_threads)
        self.sizes = sizes
        self.layers = {kind: Layers(sizes, kind, num_bytes, num_threads=num_threads) for kind in (INT8, INT4)}
        self.found: dict[str, Callable[[Array], float]] = {}
        for kind, own in self.layers.items():
            self.found[f"onnxruntime, {kind}"] = own.seconds
            self.found[f"onnxruntime, {kind}, products"] = own.products_seconds
            if own.native is not None:
                self.found[f"native, {kind}"] = own.native_seconds
        for bits in (8, 4):
            copies = max(1, -(-num_bytes // (sizes.multiply_adds * bits // 8)))
            self.found[f"onnxruntime, QMoE, int{bits}"] = WholeLayers(sizes, bits, num_bytes, num_threads).seconds
            bare = TorchProducts(sizes, bits, copies).seconds
            self.found[f"torch, int{bits}, products"] = partial(self._of_experts, bare)
        if program := built_onednn(folder):
            copies = max(1, -(-num_bytes // sizes.multiply_adds))
            bare = partial(onednn_seconds, program, sizes, copies, num_threads)
            self.found["oneDNN, int8, products"] = partial(self._of_experts, bare)

    def _of_experts(self, bare: Callable[[int], float], x: Array) -> float:
        """Seconds of all experts with tokens, from those of one with the mean number of rows."""
        experts = self.layers[INT8].touched(x)
        return experts * bare(round(len(x) * self.sizes.top_k / experts))


def measure(
    sizes: Layer,
    tokens: Sequence[int],
    *,
    num_bytes: int = LAYER_BYTES,
    num_threads: int = 1,
    repetitions: int = 7,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Seconds of one layer by all engines in turn: `cells`, with `engine`, `tokens` and `seconds` (a spread)."""
    inputs = random_tokens(sizes, tokens)
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(sizes, num_bytes, num_threads, Path(folder)).found
        cases: dict[tuple[str, int], Seconds] = {
            (name, count): partial(engine, x) for count, x in inputs.items() for name, engine in engines.items()
        }
        found = interleaved(cases, repetitions, title="products", progress=progress)
    cells = [
        {"engine": name, "tokens": count, "seconds": Spread.of(seconds).data()}
        for (name, count), seconds in found.items()
    ]
    kernels = choose_kernels("auto", [CPU]).data()
    return {"threads": num_threads, "torch": torch.__version__, "kernels": kernels, "cells": cells}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each engine, milliseconds by number of tokens."""
    tokens = sorted({cell["tokens"] for cell in results["cells"]})
    found = {(cell["engine"], cell["tokens"]): cell["seconds"] for cell in results["cells"]}
    rows = [
        (engine, *(quartiles(spread_of(found[engine, count], 1e3)) for count in tokens))
        for engine in dict.fromkeys(engine for engine, _ in found)
    ]
    return {"table": table(("ms of a layer", *(f"{count} tokens" for count in tokens)), rows)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = layer_parser("peers.products", __doc__, TOKENS).parse_args(arguments)
    found = measure(
        Layer(),
        args.tokens,
        num_bytes=args.bytes,
        num_threads=args.threads,
        repetitions=args.repetitions,
        progress=report,
    )
    publish(None, found, values, args.results)


if __name__ == "__main__":
    run_script(main)
