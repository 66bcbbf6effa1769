"""What does a billion-parameter mixture of experts cost on the edge, by number, width and top-k of the experts?

    python -m u2moe.benchmarks.studies.edge FOLDER [--prepare]

FOLDER receives the measurements and any missing bundles, which have random weights (`random_models`). An interrupted
run continues with the files in FOLDER. --prepare only makes the bundles. The workload is that of `full_size`.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.statistics import interleaved, timed
from u2moe.benchmarks.results.files import measured, publish, record, resumed, tables_by_machine
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies import full_size
from u2moe.benchmarks.studies.full_size import MODES, NATIVE, PLAIN, Case, factor, ratio
from u2moe.benchmarks.studies.shared import random_models
from u2moe.benchmarks.studies.shared.random_models import HALF, LARGE, MIXTURE, SMALL, make_bundle
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.runtime import Bundle
from u2moe.runtime.model.native import CPU, choose_kernels

TITLES = {SMALL: "Dense-225M", MIXTURE: "8x2x1920", **{name: name for name in random_models.OTHERS}}
TITLES |= {HALF: "8x2x1920 in every second block", LARGE: "Dense-1B"}
"""Titles of networks; for mixtures, number of experts x experts per token x hidden units of an expert."""
FORMATS = ("int8", "int4")  # of `make_bundle`
KERNELS = {NATIVE: "native kernels", PLAIN: "onnxruntime alone"}
ROUNDS = 5
AS_FAST = 1.05  # maximum ratio of a network's time to Dense-225M's that counts as equally fast
STATE = "edge.json"


def groups() -> Iterator[list[Case]]:
    """Yield groups of networks to measure in turn. All networks of a group have the same format and engine."""
    for form in FORMATS:
        for kernels in KERNELS:
            yield [Case(model, form, kernels) for model in TITLES]


def measure(root: Path, cases: Sequence[Case]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the seconds of each round by mode and case, as `full_size.measure` does, and the result of `starts_of`."""
    bundles = {case.key: Bundle.open(root / case.model / case.format, verify=False) for case in cases}
    kernels, seconds = cases[0].kernels, {}
    starts = full_size.starts_of(bundles, kernels)
    for mode, name in MODES.items():
        runs = {key: timed(full_size.run_of(bundle, kernels, mode)) for key, bundle in bundles.items()}
        seconds[mode] = interleaved(runs, ROUNDS, title=f"{cases[0].format}, {KERNELS[kernels]}, {name}")
    return seconds, starts


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return tables by machine, and from the last one ratios to Dense-225M and the networks that are as fast as it."""
    found = {"tables": tables_by_machine(results, _page)}
    small, *cases = next(groups())
    for content in results["machines"].values():
        for mode in MODES:
            for case in (small, *cases):
                if spread := ratio(content, mode, case, small):
                    found[f"{case.model}.{mode}"] = f"{spread.median:.2f}"
            numbers = {TITLES[case.model]: float(found.get(f"{case.model}.{mode}", "inf")) for case in cases}
            found[f"fast.{mode}"] = ", ".join(name for name, value in numbers.items() if value <= AS_FAST) or "none"
    return found


def _row(content: Mapping[str, Any], case: Case) -> list[str]:
    """Return a case's row. Each mode's time is followed by its ratio to Dense-225M in brackets. "—": not measured."""
    start, first, model = content["starts"][case.key], Case(SMALL, case.format, case.kernels), case.model
    used = f"{content['touched'][model]:.1f}" if model in content["touched"] else ""
    times = []
    for mode in MODES:
        own, share = factor(content, mode, case), ratio(content, mode, case, first)
        times.append(f"{own.median:.3f} ({share.median:.2f})" if own and share else "—")
    sizes = [f"{number / 1e6:.0f}" for number in (start["files"], start["peak_bytes"]["median"])]
    both = full_size.both_times(content, case, "—", "/")
    return [TITLES[model], case.size.replace(" ", ""), used, *sizes, *times, both]


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    yield measured(content)
    sizes = ("parameters/active, millions", "experts per chunk", "files, MB", "memory, MB")
    for cases in groups():
        title = f"{cases[0].format}, {KERNELS[cases[0].kernels]}"
        if rows := [_row(content, case) for case in cases if case.key in content["starts"]]:
            yield table((title, *sizes, *full_size.COLUMNS, "both passes: chunks/full"), rows)


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("edge", __doc__)
    parser.add_argument("folder", type=Path, help="folder of bundles and measurements, created if missing")
    parser.add_argument("--prepare", action="store_true", help="only create missing bundles; do not measure")
    args = parser.parse_args(arguments)
    chosen = choose_kernels("auto", [CPU])
    for model in TITLES:
        for form in FORMATS:
            make_bundle(model, form, args.folder)
        shutil.rmtree(args.folder / model / random_models.FLOAT, ignore_errors=True)
    state = args.folder / STATE
    content = resumed(state, {"kernels": chosen.data(), "touched": {}, "seconds": {}, "starts": {}})
    for model in TITLES:
        if random_models.is_mixture(model) and model not in content["touched"]:
            bundle = Bundle.open(args.folder / model / "int8", verify=False)
            content["touched"][model] = random_models.touched(bundle)
            record(state, content)
    for cases in groups() if not args.prepare else ():
        if (chosen.native or cases[0].kernels == PLAIN) and cases[-1].key not in content["starts"]:
            seconds, starts = measure(args.folder, cases)
            content["seconds"] = {mode: {**content["seconds"].get(mode, {}), **own} for mode, own in seconds.items()}
            content["starts"] |= starts
            record(state, content)
    if not args.prepare:
        publish(args.results, content, values, per_machine=True)
