"""Checks that a provider computes the same results as the CPU, for every graph of a bundle.

The check runs in a separate process. If a driver crashes, the crash is reported as a failure.
"""

import hashlib
import importlib
import itertools
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

from u2moe.benchmarks.instruments.host import report_head, status_bytes
from u2moe.benchmarks.instruments.operators import profiled_events
from u2moe.benchmarks.instruments.statistics import mean_seconds, show_progress
from u2moe.benchmarks.instruments.workload import UTTERANCE_S, complete_windows, utterance
from u2moe.runtime import Bundle, KernelsError, Model, SessionSettings, U2moeError, ctc_prefix_beam_search
from u2moe.runtime.bundle.contract import PACKED
from u2moe.runtime.bundle_location import DEMO_FOLDER, find_bundle
from u2moe.runtime.model.encoder import Caches, join_rows, required_cache_size, split_rows
from u2moe.runtime.model.native import installed_kernels
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

FORMAT, VERSION = "u2moe-check", 1
CHUNKS = ((16, 4), (8, -1), (4, 0))  # pairs of chunk size and number of left chunks
OFFSETS = (0, 1, 17, 250, 1023)  # numbers of frames by which a chunk is moved to a later position
NUM_CHUNKS, NUM_WARM = 1000, 200  # memory may grow from chunk `NUM_WARM` on; slow machines stop earlier
MOST_GROWTH = 32 << 20  # bytes by which memory may grow; onnxruntime and the system enlarge their buffers
BEAM_SIZE = 10
EXACT = (0.0, "the same operations in the same order")
FLOAT = (1e-3, "float32 sums may be computed in another order")
REDUCED = (5e-2, "a provider may multiply in TF32, float16 or bfloat16, which have 8 to 11 bits")
ROUNDED = (0.5, "activations have 8 bits, and one different rounding may select another expert")
PROBABLE = (5e-2, "the inputs of the product have 8 bits")
ALIKE = (2e-2, "two tokens may be almost equally probable")
_TIMED_S, _LONGEST_S = 2.0, 45.0
_CHILD = "import sys; from u2moe.benchmarks.bench.check import write_findings; write_findings(*sys.argv[1:])"
_DIGEST = "import sys; from u2moe.benchmarks.bench.check import print_digest; print_digest(sys.argv[1])"

Array = npt.NDArray[Any]
Found = dict[str, Any]
Limit = tuple[float, str]  # largest allowed difference, and its reason


def run_check(name: str | None, providers: Sequence[str]) -> Found:
    """Check a bundle (default: the demo model) with the given providers. docs/bench.md describes the report."""
    report: Found = {**report_head(FORMAT, VERSION, providers), "comparisons": [], "failures": []}
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
    for item in [item for item in report["comparisons"] if not item["holds"]]:
        text = f"{item['step']}: {item['of']} differs by {item['difference']:.2g}; the limit is {item['limit']:g}"
        report["failures"].append(text)
    return {**report, "passed": not report["failures"]}


def describe_check(report: Found) -> Iterator[str]:
    """Yield the lines of a report."""
    for step, group in itertools.groupby(report["comparisons"], lambda item: item["step"]):
        items = list(group)
        most = max(items, key=lambda item: item["difference"] / (item["limit"] or 1e-9))
        yield f"{step}: {sum(item['holds'] for item in items)} of {len(items)} pass"
        yield f"  {most['of']} differs by {most['difference']:.2g} (limit {most['limit']:g}: {most['reason']})"
    for key in ("digests", "native_kernels", "nodes", "real_time_factor", "memory"):
        if key in report:
            yield f"{key}: {json.dumps(report[key])}"
    yield from (f"failed: {failure}" for failure in report["failures"])
    yield "passed" if report["passed"] else "NOT PASSED"


def write_findings(file: str, name: str, *providers: str) -> None:
    """Run the check in this process. Append a line of JSON to `file` when a step starts, and for each finding."""

    def tell(**found: Any) -> None:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")

    def begin(name: str) -> None:
        tell(doing=name)
        show_progress(f"check: {name}")

    try:
        begin("load")
        bundle = Bundle.open(find_bundle(name or None))
        check, manifest = Check(bundle, providers), bundle.manifest
        size, recipe = sum(each.size for each in manifest.files.values()), manifest.quantization.get("recipe")
        tell(bundle={"sha256": bundle.fingerprint, "recipe": recipe, "bytes": size}, kernels=check.model.kernels.data())
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
    """Print a digest of the outputs that native kernels compute for all graphs."""
    check, digest = Check(Bundle.open(path), [DEFAULT_PROVIDER], kernels="native"), hashlib.sha256()
    for array in check.outputs(check.model).values():
        digest.update(np.ascontiguousarray(array).tobytes())
    print(digest.hexdigest()[:16])


class Check:
    """A bundle loaded twice: `model` on a provider, with tensors on its device, and `reference` on the CPU."""

    def __init__(self, bundle: Bundle, providers: Sequence[str], kernels: str | None = None) -> None:
        self.bundle, self.config, quantization = bundle, bundle.manifest.model, bundle.manifest.quantization
        self.settings = SessionSettings(providers=providers, kernels=kernels, io_binding=True)
        self.model = bundle.load(self.settings)
        self.reference = bundle.load(SessionSettings(kernels="native" if PACKED in quantization else "onnxruntime"))
        self.is_cpu = tuple(providers) == (DEFAULT_PROVIDER,)
        self.limit = ROUNDED if quantization.get("groups") else FLOAT if self.is_cpu else REDUCED
        self.chunks = [(self.config.whole_chunk(size), left) for size, left in CHUNKS if self.config.streaming]
        self.frames = utterance(bundle)
        self.encoder_out = self.reference.encode(self.frames)
        found = ctc_prefix_beam_search(self.reference.ctc(self.encoder_out), BEAM_SIZE, self.config.blank)
        self.hypotheses = [hypothesis.tokens for hypothesis in found]

    def outputs(self, model: Model) -> dict[str, Array]:
        """Return the outputs of each graph of `model`. All models get the same inputs."""
        found = {_mode(*chunks): model.encode(self.frames, *chunks) for chunks in [(None, -1), *self.chunks]}
        found["probabilities of the CTC head"] = np.exp(model.ctc(self.encoder_out))
        if model.has_decoder:
            scores = model.token_scores(self.encoder_out, self.hypotheses)
            found["probabilities of the left-to-right decoder"] = np.exp(np.concatenate([scores.left, scores.next], 1))
            if scores.right is not None:
                found["probabilities of the right-to-left decoder"] = np.exp(scores.right)
        return found

    def alike(self, model: Model, beside: Model, suffix: str = "", limit: Limit | None = None) -> Iterator[Found]:
        """Compare the outputs of `model` with those of `beside`."""
        expected = self.outputs(beside)
        for name, array in self.outputs(model).items():
            own = PROBABLE if self.limit is ROUNDED and name.startswith("probabilities") else self.limit
            yield compared(name + suffix, array, expected[name], limit or own)

    def graphs(self) -> Iterator[Found]:
        """Compare the outputs of every graph, and the best token of each frame, with those of `reference`."""
        yield from self.alike(self.model, self.reference)
        for chunks in [(None, -1), *self.chunks]:
            best = [own.ctc(own.encode(self.frames, *chunks)).argmax(axis=1) for own in (self.model, self.reference)]
            yield judged(f"best tokens, {_mode(*chunks)}", float(np.mean(best[0] != best[1])), ALIKE)

    def offsets(self) -> Iterator[Found]:
        """Compare `model` with `reference` on one chunk at several positions. Both start from the same caches."""
        for chunks, required, windows in self._windows():
            caches = self._after(self.reference, windows[:3], required)
            for offset in OFFSETS:
                moved = replace(caches, offset=caches.offset + offset)
                sides = (self.model.encoder, self.reference.encoder)
                found, expected = (own.step(windows[3], moved, required_cache_size=required) for own in sides)
                name = f"{_mode(*chunks)}, at {moved.offset[0]}"
                yield compared(name, found[0], expected[0], self.limit)
                for cache, tensor in found[1].tensors.items():
                    yield compared(f"{cache} after {name}", tensor, expected[1].tensors[cache], self.limit)

    def batches(self) -> Iterator[Found]:
        """Compare a batch of streams of different ages (the last: a short chunk) with `reference` on single streams."""
        for chunks, required, windows in self._windows():
            short = windows[2][:, : self.config.num_features(self.config.whole_chunk(1))]
            rows, last = [], [windows[0], windows[1], windows[3], short]
            batch = np.zeros((len(last), *windows[0].shape[1:]), np.float32)
            for row, age in enumerate((0, 1, 3, 2)):
                batch[row, : last[row].shape[1]] = last[row]
                caches = self._after(self.model, windows[:age], required)
                num_cached = int(caches.offset[0])
                rows += split_rows(caches, [min(num_cached, required) if required >= 0 else num_cached])
            lengths = np.array([window.shape[1] for window in last])
            found, _ = self.model.encoder.step(batch, join_rows(rows), required_cache_size=required, chunk_lens=lengths)
            for row, age in enumerate((0, 1, 3, 2)):
                caches = self._after(self.reference, windows[:age], required)
                alone, _ = self.reference.encoder.step(last[row], caches, required_cache_size=required)
                own = found[row : row + 1, : alone.shape[1]]
                yield compared(f"row {row}, {_mode(*chunks)}", own, alone, self.limit)

    def same(self) -> Iterator[Found]:
        """Compare `model` with a copy that runs on two threads, and with a copy that uses numpy arrays as tensors."""
        yield from self.alike(self.bundle.load(replace(self.settings, num_threads=2)), self.model, " with two threads")
        arrays = self.bundle.load(replace(self.settings, io_binding=False))
        yield from self.alike(arrays, self.model, " with arrays", EXACT if self.is_cpu else None)

    def native(self) -> Iterator[Found]:
        """Compare the native kernels with `reference`. All instruction sets must give bit-identical results."""
        try:
            installed_kernels()
        except KernelsError as error:
            yield {"native_kernels": f"not checked: {error}"}
            return
        sets = importlib.import_module("u2moe_kernels").description()["isas"]
        found = {isa: digest_of(self.bundle.path, isa) for isa in sets}
        yield {"digests": found}
        (usual, _), *others = Counter(found.values()).most_common()
        if others:
            wrong = ", ".join(f"{isa} ({digest})" for isa, digest in found.items() if digest != usual)
            raise KernelsError(f"results of u2moe-kernels depend on the instruction set: {wrong}, all others ({usual})")
        native = self.bundle.load(SessionSettings(kernels="native"))
        yield from self.alike(native, self.reference, " with native kernels")

    def nodes(self) -> Iterator[Found]:
        """Count the nodes per provider and the CPU fallbacks per operator in onnxruntime's profile."""
        found = {}
        for graph, events in profiled_events(self.bundle, self.settings, self.outputs, {}).items():
            nodes = {str(event["name"]): event["args"] for event in events}.values()
            on_cpu = [] if self.is_cpu else [node for node in nodes if node["provider"] == DEFAULT_PROVIDER]
            providers = Counter(node["provider"] for node in nodes)
            found[graph] = {"providers": providers, "fell_to_cpu": Counter(node["op_name"] for node in on_cpu)}
        yield {"nodes": found}

    def speed(self) -> Iterator[Found]:
        """Measure the real-time factor of the graphs, without features and search, on the provider and on the CPU."""

        def run(model: Model, size: int | None, left: int) -> None:
            output = model.encode(self.frames, size, left)
            model.ctc(output)
            if model.has_decoder:
                model.token_scores(output, self.hypotheses)

        factors: Found = {}
        for chunks in [(None, -1), *self.chunks[:1]]:
            for side, model in (("checked", self.model), ("cpu", self.reference)):
                seconds = mean_seconds(partial(run, model, *chunks), _TIMED_S)
                factors.setdefault(_mode(*chunks), {})[side] = round(seconds / UTTERANCE_S, 5)
        yield {"real_time_factor": factors}

    def memory(self) -> Iterator[Found]:
        """Run up to `NUM_CHUNKS` chunks. Check that memory grows by at most `MOST_GROWTH` after chunk `NUM_WARM`."""
        first = status_bytes("VmRSS")
        for _, required, windows in [] if first is None else itertools.islice(self._windows(), 1):
            caches, begin, number = self.model.encoder.start(), time.monotonic(), 0
            while number <= NUM_WARM or (number < NUM_CHUNKS and time.monotonic() - begin < _LONGEST_S):
                window, number = windows[number % len(windows)], number + 1
                output, caches = self.model.encoder.step(window, caches, required_cache_size=required)
                self.model.ctc(output[0])
                first = status_bytes("VmRSS") if number == NUM_WARM else first
            growth = (status_bytes("VmRSS") or 0) - (first or 0)
            yield {"memory": {"chunks": number, "after": NUM_WARM, "bytes_more": growth, "at_most": MOST_GROWTH}}
            if growth > MOST_GROWTH:
                added = f"{number - NUM_WARM} chunks added {growth} bytes of memory"
                raise ValueError(f"{added}, expected at most {MOST_GROWTH}")

    def _windows(self) -> Iterator[tuple[tuple[int, int], int, list[Array]]]:
        """Yield each (chunk size, left chunks) in `chunks`, with cache size and complete windows [1, frames, mel]."""
        for chunks in self.chunks:
            found = list(complete_windows(self.config, self.frames, chunk_size=chunks[0]))
            yield chunks, required_cache_size(*chunks), found

    @staticmethod
    def _after(model: Model, windows: Sequence[Array], required: int) -> Caches:
        """Return the caches of a stream after the chunks in `windows`."""
        caches = model.encoder.start()
        for window in windows:
            _, caches = model.encoder.step(window, caches, required_cache_size=required)
        return caches


STEPS: dict[str, Callable[[Check], Iterator[Found]]] = {
    "graphs": Check.graphs, "offsets": Check.offsets, "batches": Check.batches, "threads and device memory": Check.same,
    "native kernels": Check.native, "nodes": Check.nodes, "speed": Check.speed, "memory": Check.memory,
}  # fmt: skip


def digest_of(path: Path, isa: str) -> str:
    """Return the digest of the native kernels' results for one instruction set, computed in a separate process."""
    environment = {**os.environ, "U2MOE_KERNELS_ISA": isa}
    command = [sys.executable, "-c", _DIGEST, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise KernelsError(f"u2moe-kernels failed with the instruction set {isa}: {last}")
    return done.stdout.split()[-1]


def compared(of: str, found: Any, expected: Any, limit: Limit) -> Found:
    """Judge the largest difference (1e30 if not finite), relative to the largest expected magnitude if above 1."""
    array, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if array.shape != other.shape:
        raise ValueError(f"{of} has shape {array.shape}, expected {other.shape}")
    difference = float(np.abs(array - other).max(initial=0) / max(1.0, np.abs(other).max(initial=0)))
    return judged(of, difference if np.isfinite(difference) else 1e30, limit)


def judged(of: str, difference: float, limit: Limit) -> Found:
    """Return a difference, its limit, the reason for the limit, and whether the difference is within the limit."""
    return {"of": of, "difference": difference, "limit": limit[0], "reason": limit[1], "holds": difference <= limit[0]}


def _mode(size: int | None, left: int) -> str:
    return "full context" if size is None else f"chunks of {size}, left {left}"
