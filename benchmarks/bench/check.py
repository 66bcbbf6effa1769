"""Does a machine compute what its CPU computes? Every graph of a bundle on a provider, beside the CPU.

The work is done in a process of its own, so that a driver that ends the process is a finding as any other.
"""

from __future__ import annotations

import datetime as dt
import gc
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.host import describe_machine, status_bytes
from u2moe.benchmarks.instruments.operators import node_events, profiled_model
from u2moe.benchmarks.instruments.statistics import mean_seconds, show_progress
from u2moe.benchmarks.instruments.workload import UTTERANCE_S, clips, random_frames, utterance
from u2moe.runtime import Bundle, KernelsError, Model, SessionSettings, ctc_prefix_beam_search
from u2moe.runtime.bundle.contract import PACKED
from u2moe.runtime.bundle_location import DEMO_FOLDER, find_bundle
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.model.encoder import Windows, join_rows, required_cache_size, split_rows
from u2moe.runtime.model.native import installed_kernels
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

FORMAT, VERSION = "u2moe-check", 1
CHUNKS = ((16, 4), (8, -1), (4, 0))
"""Chunk sizes and left chunks."""
OFFSETS = (0, 1, 17, 250, 1023)
"""Positions of a chunk, counted from the end of its left context."""
NUM_CHUNKS, NUM_WARM = 1000, 200
"""Chunks after which memory is read at the latest, and those before it is read for the first time."""
MOST_GROWTH = 32 << 20
"""Bytes that chunks may add: buffers of onnxruntime and of the system settle late."""
BEAM_SIZE = 10
PROBABILITIES = ("probabilities", "left-to-right decoder", "its next tokens", "right-to-left decoder")
EXACT = (0.0, "the same operations in the same order")
FLOAT = (1e-3, "float32, whose sums may be rounded in another order")
REDUCED = (5e-2, "a provider may multiply in TF32, float16 or bfloat16, with 8 to 11 bits")
ROUNDED = (0.5, "activations are rounded to 8 bits, and one that is rounded the other way may choose another expert")
PROBABLE = (5e-2, "a product of inputs that are rounded to 8 bits")
ALIKE = (2e-2, "two tokens may be about as probable")
_TIMED_S, _LONGEST_S = 2.0, 45.0
_CHILD = "import sys; from u2moe.benchmarks.bench.check import write_findings; write_findings(*sys.argv[1:])"
_DIGEST = "import sys; from u2moe.benchmarks.bench.check import print_digest; print_digest(sys.argv[1])"

Array = npt.NDArray[Any]
Found = dict[str, Any]


def run_check(name: str | None, providers: Sequence[str]) -> Found:
    """Check a bundle, by default the demo model, on providers; docs/bench.md describes the report."""
    report: Found = {
        "format": FORMAT,
        "version": VERSION,
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "providers": list(providers),
        "comparisons": [],
        "failures": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        findings, doing = Path(folder, "findings"), "start"
        findings.touch()
        command = [sys.executable, "-c", _CHILD, str(findings), name or "", *providers]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode  # noqa: S603 - ourselves
        for line in findings.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            doing = found.pop("doing", doing)
            for several in ("comparisons", "failures"):
                report[several] += found.pop(several, [])
            report |= found
    if code:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        report["failures"].append(f"{doing}: the process ended with {name}")
    report["failures"] += [
        f"{item['step']}: {item['of']} differs by {item['difference']:.2g}, at most {item['limit']:g} is allowed"
        for item in report["comparisons"]
        if not item["holds"]
    ]
    return {**report, "passed": not report["failures"]}


def describe_check(report: Found) -> Iterator[str]:
    """A report as text."""
    steps: dict[str, list[Found]] = {}
    for item in report["comparisons"]:
        steps.setdefault(item["step"], []).append(item)
    for step, items in steps.items():
        most = max(items, key=lambda item: item["difference"] / (item["limit"] or 1e-9))
        yield f"{step}: {sum(item['holds'] for item in items)} of {len(items)} alike"
        yield f"  {most['of']} differs by {most['difference']:.2g}, at most {most['limit']:g}: {most['reason']}"
    for digests in [report["digests"]] if "digests" in report else ():
        yield f"kernels: {', '.join(f'{isa} {digest}' for isa, digest in digests.items())}"
    for graph, nodes in report.get("nodes", {}).items():
        own = ", ".join(f"{count} on {provider}" for provider, count in nodes["providers"].items())
        fell = ", ".join(f"{count} {op_type}" for op_type, count in nodes["fell_to_cpu"].items())
        yield f"nodes of {graph}: {own}{f'; fell to the CPU: {fell}' if fell else ''}"
    for mode, factors in report.get("real_time_factor", {}).items():
        yield f"RTF {mode}: {factors['checked']:.4f}, on the CPU {factors['cpu']:.4f}"
    for key in ("memory", "native_kernels"):
        if key in report:
            yield f"{key.replace('_', ' ')}: {report[key]}"
    yield from (f"failed: {failure}" for failure in report["failures"])
    yield "passed" if report["passed"] else "NOT PASSED"


def write_findings(file: str, name: str, *providers: str) -> None:
    """The work of the process: appends a line of JSON for each step that begins, and for each thing found."""

    def tell(**found: Any) -> None:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")

    def begin(name: str) -> None:
        tell(doing=name)
        show_progress(f"check: {name}")

    try:
        begin("load")
        check = Check(Bundle.open(find_bundle(name or None)), providers)
        tell(bundle=check.description, kernels=check.model.kernels.data())
    except (U2moeError, ValueError) as error:
        tell(failures=[f"load: {error}".replace(f"{name}{os.sep}" if name else str(DEMO_FOLDER) + os.sep, "")])
        return
    for title, step in STEPS.items():
        begin(title)
        try:
            for found in step(check):
                tell(**({"comparisons": [{"step": title, **found}]} if "limit" in found else found))
        except (U2moeError, ValueError) as error:
            tell(failures=[f"{title}: {error}"])


def print_digest(path: str) -> None:
    """Print a digest of what all graphs give with native kernels."""
    check, digest = Check(Bundle.open(path), [DEFAULT_PROVIDER], kernels="native"), hashlib.sha256()
    for array in check.outputs(check.model).values():
        digest.update(np.ascontiguousarray(array).tobytes())
    print(digest.hexdigest()[:16])


class Check:
    """A bundle on a provider, with its values on the device, and on the CPU, as arrays and on onnxruntime alone."""

    def __init__(self, bundle: Bundle, providers: Sequence[str], kernels: str | None = None) -> None:
        self.bundle = bundle
        self.config = bundle.manifest.model
        self.settings = SessionSettings(providers=providers, kernels=kernels, io_binding=True)
        self.model = bundle.load(self.settings)
        is_packed = PACKED in bundle.manifest.quantization
        self.reference = bundle.load(SessionSettings(kernels="native" if is_packed else "onnxruntime"))
        self.frames = utterance(bundle) if clips() else random_frames(bundle)
        self.is_cpu = tuple(providers) == (DEFAULT_PROVIDER,)
        quantization = bundle.manifest.quantization
        self.is_rounded = bool(quantization.get("groups"))
        self.limit = ROUNDED if self.is_rounded else FLOAT if self.is_cpu else REDUCED
        self.encoder_out = self.reference.encode(self.frames)
        log_probs = self.reference.ctc(self.encoder_out)
        self.hypotheses = [found.tokens for found in ctc_prefix_beam_search(log_probs, BEAM_SIZE, self.config.blank)]
        sizes = {"bytes": sum(file.size for file in bundle.manifest.files.values())}
        self.description = {"sha256": bundle.fingerprint, "recipe": quantization.get("recipe"), **sizes}

    def chunks(self) -> list[tuple[int, int]]:
        """Chunk sizes and left chunks that the encoder supports."""
        return [(self.config.whole_chunk(size), left) for size, left in CHUNKS] if self.config.streaming else []

    def limit_of(self, output: str) -> tuple[float, str]:
        """The limit on an output of `outputs`."""
        return PROBABLE if self.is_rounded and output in PROBABILITIES else self.limit

    def outputs(self, model: Model) -> dict[str, Array]:
        """What each graph gives for the same input, probabilities instead of their logarithms."""
        found = {"encoder output": model.encode(self.frames), "probabilities": np.exp(model.ctc(self.encoder_out))}
        if model.has_decoder:
            scores = model.token_scores(self.encoder_out, self.hypotheses)
            found["left-to-right decoder"], found["its next tokens"] = np.exp(scores.left), np.exp(scores.next)
            if scores.right is not None:
                found["right-to-left decoder"] = np.exp(scores.right)
        found |= {
            f"chunks of {size}, left {left}": model.encode(self.frames, size, left) for size, left in self.chunks()
        }
        return found

    def whole(self) -> Iterator[Found]:
        """Full context, chunks, CTC head and both decoders."""
        expected = self.outputs(self.reference)
        for name, array in self.outputs(self.model).items():
            yield compared(name, array, expected[name], self.limit_of(name))

    def tokens(self) -> Iterator[Found]:
        """The best token of each frame, from end to end."""
        for size, left in [(None, -1), *self.chunks()]:
            pair = [own.ctc(own.encode(self.frames, size, left)).argmax(axis=1) for own in (self.model, self.reference)]
            name = "full context" if size is None else f"chunks of {size}, left {left}"
            yield judged(f"best tokens, {name}", float(np.mean(pair[0] != pair[1])), ALIKE)

    def offsets(self) -> Iterator[Found]:
        """A chunk at many positions, with the same caches on both sides."""
        for (size, left), windows in self._windows():
            required, caches = required_cache_size(size, left), self.reference.encoder.start()
            for window in windows[:3]:
                _, caches = self.reference.encoder.step(window, caches, required_cache_size=required)
            for offset in OFFSETS:
                moved = replace(caches, offset=caches.offset + offset)
                sides = (self.model.encoder, self.reference.encoder)
                pair = [own.step(windows[3], moved, required_cache_size=required) for own in sides]
                name = f"chunk of {size}, left {left}, at {caches.offset[0] + offset}"
                yield compared(name, pair[0][0], pair[1][0], self.limit)
                for cache, tensor in pair[0][1].tensors.items():
                    yield compared(f"{cache} after {name}", tensor, pair[1][1].tensors[cache], self.limit)

    def batches(self) -> Iterator[Found]:
        """Streams of different age in one call, the last of them with a short chunk, beside each alone on the CPU."""
        for (size, left), windows in self._windows():
            required, rows, expected = required_cache_size(size, left), [], []
            shortest = windows[0][:, : self.config.num_features(self.config.whole_chunk(1))]
            last = [windows[0], windows[1], windows[3], shortest]
            for age, window in zip((0, 1, 3, 2), last, strict=True):
                sides = [(own.encoder, own.encoder.start()) for own in (self.model, self.reference)]
                for past in windows[:age]:
                    sides = [(own, own.step(past, kept, required_cache_size=required)[1]) for own, kept in sides]
                num_cached = int(sides[0][1].offset[0])
                rows += split_rows(sides[0][1], [min(num_cached, required) if required >= 0 else num_cached])
                expected.append(sides[1][0].step(window, sides[1][1], required_cache_size=required)[0])
            batch = np.zeros((len(last), *windows[0].shape[1:]), np.float32)
            for row, window in zip(batch, last, strict=True):
                row[: window.shape[1]] = window[0]
            lengths = np.array([window.shape[1] for window in last])
            encoder = self.model.encoder
            found, _ = encoder.step(batch, join_rows(rows), required_cache_size=required, chunk_lens=lengths)
            for row, alone in enumerate(expected):
                name = f"row {row} of 4, chunk of {size}, left {left}"
                yield compared(name, found[row : row + 1, : alone.shape[1]], alone, self.limit)

    def same(self) -> Iterator[Found]:
        """Two threads, and values as arrays, give what the provider gives with one thread and values on its device."""
        expected = self.outputs(self.model)
        for title, change in (("two threads", {"num_threads": 2}), ("arrays", {"io_binding": False})):
            model, is_exact = self.bundle.load(replace(self.settings, **change)), self.is_cpu and title == "arrays"
            for name, array in self.outputs(model).items():
                limit = EXACT if is_exact else self.limit_of(name)
                yield compared(f"{name} with {title}", array, expected[name], limit)

    def digests(self) -> Iterator[Found]:
        """Native kernels on every instruction set of this processor, which agree to the last bit."""
        try:
            installed_kernels()
        except KernelsError as error:
            yield {"native_kernels": f"not checked: {error}"}
            return
        found = {
            isa: digest_of(self.bundle.path, isa)
            for isa in importlib.import_module("u2moe_kernels").description()["isas"]
        }
        yield {"digests": found}
        (usual, _), *others = Counter(found.values()).most_common()
        if others:
            wrong = ", ".join(f"{isa} ({digest})" for isa, digest in found.items() if digest != usual)
            raise KernelsError(f"u2moe-kernels compute something else with {wrong} than with the others ({usual})")
        native = self.bundle.load(SessionSettings(kernels="native"))
        expected = self.outputs(self.reference)
        for name, array in self.outputs(native).items():
            yield compared(f"{name} with native kernels", array, expected[name], self.limit_of(name))

    def nodes(self) -> Iterator[Found]:
        """The nodes that the provider runs, and those that fell to the CPU, from onnxruntime's profile."""
        with tempfile.TemporaryDirectory() as folder:
            model = profiled_model(self.bundle, Path(folder), self.settings)
            self.outputs(model)
            del model
            gc.collect()  # a session writes its profile when it is destroyed
            found = {}
            for file in sorted(Path(folder).iterdir()):
                events = {str(event["name"]): event["args"] for event in node_events(file)}
                fell = [args["op_name"] for args in events.values() if args["provider"] == DEFAULT_PROVIDER]
                found[file.name.split("_")[1]] = {
                    "providers": Counter(args["provider"] for args in events.values()),
                    "fell_to_cpu": {} if self.is_cpu else dict(Counter(fell).most_common()),
                }
        yield {"nodes": found}

    def speed(self) -> Iterator[Found]:
        """Seconds of all graphs per second of audio on both sides, without features and search."""
        factors: Found = {}
        for size, left in [(None, -1), *self.chunks()[:1]]:
            name = "full context" if size is None else f"chunks of {size}, left {left}"
            for side, own in (("checked", self.model), ("cpu", self.reference)):
                seconds = mean_seconds(partial(self._run, own, size, left), _TIMED_S)
                factors.setdefault(name, {})[side] = seconds / UTTERANCE_S
        yield {"real_time_factor": factors}

    def memory(self) -> Iterator[Found]:
        """Memory of the process over a thousand chunks."""
        if not self.config.streaming or status_bytes("VmRSS") is None:
            yield {
                "memory": "not checked: the encoder has no chunks"
                if status_bytes("VmRSS")
                else "not told by the system"
            }
            return
        (size, left), windows = next(self._windows())
        encoder, caches, before = self.model.encoder, self.model.encoder.start(), 0
        begin, number = time.monotonic(), 0
        while number <= NUM_WARM or (number < NUM_CHUNKS and time.monotonic() - begin < _LONGEST_S):
            if number == NUM_WARM:
                before = status_bytes("VmRSS") or 0
            window, required = windows[number % len(windows)], required_cache_size(size, left)
            output, caches = encoder.step(window, caches, required_cache_size=required)
            self.model.ctc(output[0])
            number += 1
        growth = (status_bytes("VmRSS") or 0) - before
        yield {"memory": {"chunks": number, "after": NUM_WARM, "bytes_more": growth, "at_most": MOST_GROWTH}}
        if growth > MOST_GROWTH:
            raise ValueError(f"{number - NUM_WARM} chunks took {growth} bytes, expected at most {MOST_GROWTH}")

    def _run(self, model: Model, size: int | None, left: int) -> None:
        output = model.encode(self.frames, size, left)
        model.ctc(output)
        if model.has_decoder:
            model.token_scores(output, self.hypotheses)

    def _windows(self) -> Iterator[tuple[tuple[int, int], list[Array]]]:
        """Features of chunks [1, frames, mel] of each size, all of the same length."""
        for size, left in self.chunks():
            cutter = Windows(self.config, size)
            cutter.accept(self.frames)
            found = []
            while (window := cutter.take()) is not None:
                found.append(window[np.newaxis])
            yield (size, left), found


STEPS: dict[str, Callable[[Check], Iterator[Found]]] = {
    "graphs": Check.whole,
    "tokens": Check.tokens,
    "offsets": Check.offsets,
    "batches": Check.batches,
    "threads and memory of the device": Check.same,
    "native kernels": Check.digests,
    "nodes": Check.nodes,
    "speed": Check.speed,
    "memory": Check.memory,
}
"""What is checked, in this order."""


def digest_of(path: Path, isa: str) -> str:
    """The digest that native kernels give on an instruction set, in a process of its own."""
    environment = {**os.environ, "U2MOE_KERNELS_ISA": isa}
    command = [sys.executable, "-c", _DIGEST, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise KernelsError(f"u2moe-kernels fail with the instruction set {isa}: {last}")
    return done.stdout.split()[-1]


def compared(of: str, found: Any, expected: Any, limit: tuple[float, str]) -> Found:
    """The largest difference of two arrays, relative to the largest value if that exceeds 1; not a number: infinite."""
    array, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if array.shape != other.shape:
        raise ValueError(f"{of} has shape {array.shape}, expected {other.shape}")
    difference = float(np.abs(array - other).max(initial=0) / max(1.0, np.abs(other).max(initial=0)))
    return judged(of, difference if np.isfinite(difference) else 1e30, limit)


def judged(of: str, difference: float, limit: tuple[float, str]) -> Found:
    """A difference beside its limit."""
    return {"of": of, "difference": difference, "limit": limit[0], "reason": limit[1], "holds": difference <= limit[0]}
