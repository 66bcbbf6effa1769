"""Do huge pages for what onnxruntime itself allocates make MoE-1B faster? Processes side by side, Linux only.

    python -m u2moe.benchmarks.full_size.huge_pages FOLDER [--results FILE]

FOLDER is that of `full_size.native`. The int8 bundle is loaded by processes that differ in how they get huge pages, for
the native kernels, whose weights lie in huge pages anyway, and for onnxruntime alone. They take turns on one thread;
what counts is processor time, which other load changes least.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from u2moe.benchmarks.full_size.cells import MIXTURE
from u2moe.benchmarks.full_size.even_routing import TurnedSettings
from u2moe.benchmarks.full_size.native import TITLES, Case, gates_of
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios
from u2moe.benchmarks.instruments.workload import one_round, random_frames
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import measured_here
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime.model.native import KERNELS

PLAIN, MALLOC, COLLAPSE = "plain", "malloc", "collapse"
WAYS = {
    PLAIN: "as the system does it",
    MALLOC: "`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`",
    COLLAPSE: "`MADV_COLLAPSE` after loading",
}
MODES = ("streaming", "full")
ROUNDS = 7
_ENVIRONMENT = {MALLOC: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
_CHILD = "import sys; from u2moe.benchmarks.full_size.huge_pages import answer; answer(*sys.argv[1:])"
_HUGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


class Process:
    """A process that has loaded the bundle, and does a round of a mode whenever it is asked to."""

    def __init__(self, root: Path, kernels: str, way: str) -> None:
        """Start it."""
        environment = {**os.environ, **_ENVIRONMENT.get(way, {})}
        command = [sys.executable, "-c", _CHILD, str(root), kernels, way]
        self._process = subprocess.Popen(  # noqa: S603 - ourselves
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ask(self, question: str) -> float:
        """Processor seconds of a round of a mode, or "huge": megabytes in huge pages."""
        with contextlib.suppress(BrokenPipeError):
            print(question, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        return float(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def answer(root: str, kernels: str, way: str) -> None:
    """Answer what `Process.ask` asks."""
    case = Case(MIXTURE, "int8", kernels)
    bundle, settings = case.bundle(Path(root)), TurnedSettings(gates_of(Path(root), case))
    model = bundle.load(sess_options=settings.options(kernels=kernels), verify=False)
    frames = random_frames(bundle)
    rounds = {mode: one_round(mode, model, frames) for mode in MODES}
    for run in rounds.values():
        run()
    if way == COLLAPSE:
        collapse()
    for line in sys.stdin:
        question = line.strip()
        if question == "huge":
            print(huge_mb(), flush=True)
            continue
        begin = time.process_time()
        rounds[question]()
        print(time.process_time() - begin, flush=True)


def collapse() -> None:
    """Make huge pages of all anonymous memory that this process can write, as far as the system has them."""
    advise = ctypes.CDLL(None).madvise
    for begin, end in _anonymous():
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):  # what is refused stays as it is
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def _anonymous() -> Iterator[tuple[int, int]]:
    """Whole huge pages of the heap and of mappings without a file."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            begin, end = (int(address, 16) for address in place.split("-"))
            begin, end = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if begin < end:
                yield begin, end


def huge_mb() -> float:
    """Megabytes of this process in huge pages."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(encoding="ascii"))
    return int(found[1]) * 1024e-6 if found else 0.0


def measure(root: Path, *, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All measurements on this machine.

    Returns:
        seconds: processor time of each round, by kernels, mode and way; huge_mb: afterwards, by kernels and way.
    """
    found: dict[str, Any] = {"seconds": {}, "huge_mb": {}}
    for kernels in KERNELS[1:]:
        with contextlib.ExitStack() as stack:
            processes = {way: stack.enter_context(Process(root, kernels, way)) for way in WAYS}
            found["seconds"][kernels] = {
                mode: interleaved(
                    {way: partial(process.ask, mode) for way, process in processes.items()},
                    ROUNDS,
                    title=f"{kernels}, {mode}",
                    progress=progress,
                )
                for mode in MODES
            }
            found["huge_mb"][kernels] = {way: process.ask("huge") for way, process in processes.items()}
    return found


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a table, and the gain of each way by the fastest rounds."""
    rows, found = [], {}
    for kernels, modes in results["seconds"].items():
        for mode, seconds in modes.items():
            for way, title in WAYS.items():
                gain = "" if way == PLAIN else quartiles(ratios(seconds[PLAIN], seconds[way]))
                least = min(seconds[PLAIN]) / min(seconds[way])
                found[f"{kernels}.{mode}.{way}"] = f"{least:.2f}"
                rows.append([
                    f"{kernels}, {TITLES[mode]}", title, f"{results['huge_mb'][kernels][way]:.0f}",
                    quartiles(Spread.of(seconds[way]), 3), gain, "" if way == PLAIN else f"{least:.2f}",
                ])  # fmt: skip
    header = ("kernels", "huge pages", "MB in them", "processor seconds", "times as fast", "by the fastest rounds")
    return {"table": table(header, rows, left=2), **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("full_size.huge_pages", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles of `full_size.native --prepare`")
    parser.add_argument("--results", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    results = {**measured_here(), **measure(args.folder, progress=report)}
    write_json(args.results or results_file("huge_pages"), results)
    print(values(results)["table"])


if __name__ == "__main__":
    run_script(main)
