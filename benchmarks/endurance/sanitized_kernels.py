"""Do the native kernels touch what they must not, or race? Sanitizers, valgrind, and thousands of damaged layers.

    python -m u2moe.benchmarks.endurance.sanitized_kernels BUILD [--checks address thread] [--inputs 10000] [--idle]

Run in a clone with CMake, g++ and valgrind. Each check builds the library in a folder of BUILD; every array then has
memory of its own, AMX is emulated, and all instruction sets of this processor take part:

- address: programs without onnxruntime, then the tests of the operators on each instruction set and of sessions on one,
  with fewer random examples than usual, with the address and undefined-behaviour sanitizers.
- thread: the program with many threads, then the tests of sessions and threads, with the thread sanitizer.
- valgrind: the programs under valgrind's memcheck, which also finds uses of what nobody has written. It has no AVX-512.
- damaged: `--inputs` layers that lie, each instruction set its share, with the sanitizers of `address`. A second run
  continues where the first was stopped.

Results are written after each step. Exits with 1 if anything was found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from u2moe.benchmarks.endurance import fuzz
from u2moe.benchmarks.endurance.worker import Worker
from u2moe.benchmarks.results.files import repository, results_file, write_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.script import report, run_script, script_parser

PROGRAMS = ("u2moe_kernels_digests", "u2moe_kernels_stress")
LIBRARY = "u2moe_kernels"
TESTS = ("operators", "constants", "attention", "convolutions", "streamed_convolution")
SESSIONS = "sessions"
"""Tests of memory, threads and processes, which are the same on every instruction set."""
EMULATED = "amx"
"""Its products are tested alone: everything else is as with AVX-512 VNNI."""
NUM_EXAMPLES = "12"
"""Random examples of each test under a sanitizer, which makes them many times slower; `damaged` tries thousands."""
THREADED = "threads or come_and_go or any_order or forked"
"""Tests that have several threads or processes."""
OPTIONS = {
    # Python and onnxruntime leave memory behind when they end. Use after return is not looked for: the stack for that
    # is less aligned than the vectors that GCC 12 keeps on it, and programs crash there.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:hard_rss_limit_mb=6000",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Python and onnxruntime are not built with the sanitizer: what they do to each other with memcpy is not judged.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:die_after_fork=0",
}
SANITIZERS = {"address": "address,undefined", "thread": "thread", "valgrind": ""}
PRELOADED = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",), "valgrind": ()}
CHECKS = (*SANITIZERS, "damaged")
TITLES = {
    "address": "address and undefined-behaviour sanitizers",
    "thread": "thread sanitizer",
    "valgrind": "valgrind (memcheck)",
}
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9")
LEAKS = ("--leak-check=full", "--errors-for-leak-kinds=definite")
"""Not in the program that forks: what the threads of a parent hold is lost in its children."""
NOT_RUN = "They have not been run with these kernels yet."
_NUM_LINES = 40


@dataclass(frozen=True, kw_only=True)
class Step:
    """One run of a program or of tests.

    Attributes:
        name: what ran; `isas`: instruction sets that took part.
        passed: whether it ended as it should, without findings.
        output: the end of what it printed if it did not; otherwise the summary of tests.
    """

    name: str
    isas: Sequence[str]
    passed: bool
    output: str


class Build:
    """Programs and library for one check, in a folder of their own."""

    def __init__(self, check: str, folder: Path) -> None:
        """Build them; takes minutes the first time."""
        self.check = check
        self.folder = folder / check
        kind = SANITIZERS[check]
        options = ["-DU2MOE_CHECKED=ON", "-DU2MOE_AMX_EMULATED=ON", "-DCMAKE_BUILD_TYPE=None"]
        source = repository() / "runtime" / "kernels"
        self._run(
            [
                "cmake",
                "-S",
                source,
                "-B",
                self.folder,
                f"-DU2MOE_SANITIZE={kind}",
                *options,
                f"-DCMAKE_CXX_FLAGS={'-O1 -g'}",
            ]
        )
        self._run(["cmake", "--build", self.folder, "--target", *PROGRAMS, LIBRARY])
        self.library = self.folder / f"lib{LIBRARY}.so"

    @staticmethod
    def _run(command: Sequence[str | Path]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - cmake

    def isas(self, prefix: Sequence[str] = ()) -> list[str]:
        """Instruction sets of this processor, as its programs see them."""
        command = [*prefix, str(self.folder / PROGRAMS[0])]
        done = subprocess.run(command, env={**os.environ, **OPTIONS}, check=True, capture_output=True, text=True)  # noqa: S603
        return [line.split()[0] for line in done.stdout.splitlines()]

    def environment(self, isa: str = "") -> dict[str, str]:
        """The environment in which Python can load the library, and in which tests use it."""
        found = [_file_of(name) for name in PRELOADED[self.check]]
        own = {"LD_PRELOAD": ":".join(found), "U2MOE_TEST_KERNELS": str(self.library), "U2MOE_KERNELS_ISA": isa}
        own["U2MOE_TEST_EXAMPLES"] = NUM_EXAMPLES
        return {**os.environ, **OPTIONS, **own}

    def program(self, name: str, prefix: Sequence[str] = ()) -> Step:
        """Run a program on all instruction sets."""
        report(f"{self.check}: {name}")
        done = _ended([*prefix, str(self.folder / name)], {**os.environ, **OPTIONS})
        isas = list(dict.fromkeys(line.split()[0] for line in done.stdout.splitlines() if line))
        digests = {line.split()[1] for line in done.stdout.splitlines() if line} if name == PROGRAMS[0] else {""}
        passed = done.returncode == 0 and len(digests) == 1
        return Step(
            name=name.removeprefix(f"{LIBRARY}_"), isas=isas, passed=passed, output="" if passed else _tail(done)
        )

    def tests(self, files: Sequence[str], isa: str, chosen: str = "") -> Step:
        """Run tests of the operators on one instruction set."""
        report(f"{self.check}: tests of {', '.join(files)} on {isa}")
        names = [f"tests/kernels/test_{name}.py" for name in files]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *names,
            *(["-k", chosen] if chosen else []),
        ]
        done = _ended([*_fixed_addresses(self.check), *command], self.environment(isa))
        passed = done.returncode == 0
        summary = re.search(r"\d+ passed.*?(?= in )", done.stdout)
        output = summary.group() if passed and summary else _tail(done)
        return Step(name=f"tests of {' and '.join(files)}", isas=[isa], passed=passed, output=output)


def _file_of(name: str) -> str:
    """The path of a library of the compiler."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 - g++


def _fixed_addresses(check: str) -> list[str]:
    """The thread sanitizer of GCC 12 does not start where the system places programs at will."""
    return ["setarch", "--addr-no-randomize"] if check == "thread" else []


def _ended(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - ourselves
        command, cwd=repository(), env=environment, check=False, capture_output=True, text=True, errors="replace"
    )


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return "\n".join([f"exit code {done.returncode}", *lines[-_NUM_LINES:]])


def address(folder: Path) -> Iterator[Step]:
    """Programs, then tests of operators on each instruction set, and of sessions on the best that is not emulated."""
    build = Build("address", folder)
    yield from map(build.program, PROGRAMS)
    isas = build.isas()
    best = next(isa for isa in isas if isa != EMULATED)
    for isa in isas:
        yield build.tests(TESTS[:1] if isa == EMULATED else TESTS, isa)
    yield build.tests([SESSIONS], best)


def thread(folder: Path) -> Iterator[Step]:
    """The program with threads, then tests through onnxruntime."""
    build, prefix = Build("thread", folder), _fixed_addresses("thread")
    yield build.program(PROGRAMS[1], prefix)
    for isa in build.isas(prefix):
        yield build.tests([*TESTS, SESSIONS], isa, THREADED)


def valgrind(folder: Path) -> Iterator[Step]:
    """Both programs."""
    build = Build("valgrind", folder)
    yield build.program(PROGRAMS[0], [*VALGRIND, *LEAKS])
    yield build.program(PROGRAMS[1], VALGRIND)


RUNS: Mapping[str, Callable[[Path], Iterator[Step]]] = {"address": address, "thread": thread, "valgrind": valgrind}


def damaged(folder: Path, results: Path, num_inputs: int, until: float | None) -> None:
    """Damaged layers on each instruction set; see `fuzz.fuzz`. What sanitizers say is in the folder."""
    build = Build("address", folder)

    def start(isa: str) -> Worker:
        command = ["-m", "u2moe.benchmarks.endurance.damaged_layers", str(build.library)]
        return Worker(command, environment=build.environment(isa), log=build.folder / f"{isa}.log")

    isas = build.isas()
    fuzz.fuzz(start, results, dict.fromkeys(isas, -(-num_inputs // len(isas))), until=until, progress=report)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each step, one for each instruction set with damaged layers, and what was found."""
    rows, found = [], []
    for check, steps in results.get("checks", {}).items():
        for step in steps:
            state = "nothing" if step["passed"] else "FAILED"
            summary = step["output"] if step["passed"] else ""
            rows.append((TITLES[check], step["name"], ", ".join(step["isas"]), summary, state))
            found += [] if step["passed"] else [f"{check}, {step['name']}: {step['output']}"]
    tried = fuzz.values({"kinds": results.get("kinds", {})})
    return {
        "table": table(("check", "what runs", "instruction sets", "tests", "found"), rows, left=5) if rows else NOT_RUN,
        "damaged": tried["table"],
        "tried": tried["tried"],
        "failed": str(len(found) + int(tried["failed"])),
        "findings": "\n\n".join(found),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = script_parser("endurance.sanitized_kernels", __doc__)
    parser.add_argument("build", type=Path, help="folder for builds, created if missing")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="default: all")
    parser.add_argument("--inputs", type=int, default=10_000, help="number of damaged layers (default: 10,000)")
    parser.add_argument("--minutes", type=float, help="stop trying damaged layers after this time")
    parser.add_argument("--results", type=Path, help="JSON file, continued if it is there")
    parser.add_argument("--idle", action="store_true", help="use only idle processors (SCHED_IDLE, Linux)")
    args = parser.parse_args(arguments)
    if args.idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    results, folder = args.results or results_file("sanitized_kernels"), args.build.resolve()
    for check in args.checks:
        if check == "damaged":
            until = time.monotonic() + 60 * args.minutes if args.minutes else None
            damaged(folder, results, args.inputs, until)
        else:
            content = resumed(results, {"checks": {}, "kinds": {}})
            steps = content["checks"][check] = []
            for step in RUNS[check](folder):
                steps.append(asdict(step))
                write_json(results, recorded(content))
    shown = values(resumed(results, {}))
    print(shown["table"], shown["damaged"], shown["findings"], sep="\n\n")
    return int(shown["failed"] != "0")


if __name__ == "__main__":
    run_script(main)
