"""The sub-commands `quantize` and `inspect`. They import onnx only when they run."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2moe.quantize.recipes import FORMATS, LONGEST_S, NO_RECIPE, RECIPES, Goal, Recipe, recipe
from u2moe.runtime.bundle.weight_formats import WEIGHT_FORMATS
from u2moe.runtime.bundle_location import DEMO_FOLDER, find_bundle
from u2moe.runtime.declarations import options_of
from u2moe.runtime.validation import checked_number

if TYPE_CHECKING:
    from u2moe.runtime.corpus.lists import Recording

_SWITCH = {"action": "store_true"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "--recipe": {"choices": (*RECIPES, NO_RECIPE), "help": (
        "default: int8, but int4 with --calibrate and a limit such as --max-damage; "
        f"{NO_RECIPE}: quantize only the groups and layers that other options name")},
    "--calibrate": {"metavar": "PATH", "type": Path, "nargs": "+", "default": [], "help": (
        "fit the bundle to these recordings (audio files, folders, or .tsv lists as for --list): move the scale of "
        "activation channels with large values into the weights, and round the weights of each layer so that its "
        f"output changes least; choose a few minutes of typical speech; at most {LONGEST_S // 60} minutes are used "
        "(default: round each weight to the nearest value)")},
    "--list": {"metavar": "PATH", "help": (
        "measure errors on these recordings: a file of path<TAB>transcript lines, or a folder (default: the demo "
        "model's clips)")},
    "--overwrite": {**_SWITCH, "help": "replace an existing bundle"},
    "--dry-run": {**_SWITCH, "help": "print the size of each group of weights and write nothing"},
}  # fmt: skip
_LIMITS = {
    "max_damage": ("--max-damage", "PERCENT", 1 / 100, (
        "with --calibrate: write the smallest bundle that changes at most this percentage of tokens, measured on "
        "recordings that were not used to choose formats; damaging layers get a better format than the recipe's")),
    "max_divergence": ("--max-divergence", "NATS", 1, (
        "like --max-damage, for the divergence of both passes from float32, in nats per encoder frame")),
    "max_bytes": ("--max-size", "MB", 1e6, (
        "with --calibrate: write at most this many megabytes; the most damaging layers get better formats")),
    "target_rtf": ("--target-rtf", "X", 1, (
        "like --max-size, for the encoder's time per second of audio, with one thread on this machine")),
    "max_wer_increase": ("--max-wer-increase", "POINTS", 1 / 100, (
        "fail if the word error rate rises by more percentage points than this (needs --list); with --calibrate: "
        "use better formats until the limit is met")),
}  # fmt: skip
"""For each limit, a field of `Goal`: the option, its unit, the factor to the unit of the field, and the help text."""
_FOR_EXPERTS: dict[str, dict[str, Any]] = {
    "--calibration": {"metavar": "FILE", "type": Path, "help": (
        "with --calibrate: save the features of the recordings to FILE (.npz); without --calibrate: calibrate with the "
        "features in FILE. FILE can be reused with any recipe for the same float32 bundle")},
    "--group": {"metavar": "GROUP=FORMAT", "action": "append", "default": [], "help": (
        "set the format of one group of weights: "
        + "; ".join(f"{group} ({', '.join(kinds)})" for group, kinds in FORMATS.items()))},
    "--layer": {"metavar": "LAYER=FORMAT", "action": "append", "default": [], "help": (
        f"set the format ({', '.join(WEIGHT_FORMATS)}) of one layer, named as in the report or in `u2moe inspect`")},
    "--layers": {"metavar": "FILE", "type": Path, "help": (
        "set the formats of the layers listed in a JSON file {layer: format}")},
    **{flag: {"dest": name, "metavar": unit, "type": float, "help": about}
       for name, (flag, unit, _, about) in _LIMITS.items()},
    "--resume": {**_SWITCH, "help": (
        "keep damage measurements in OUT.damage.jsonl until OUT is written; reuse those of an interrupted run")},
    "--packed": {**_SWITCH, "help": (
        "write weights in the layout of the native kernels (u2moe-kernels): the bundle loads faster, and "
        "several processes share its memory, but it cannot run without these kernels")},
    "--accept-damage": {**_SWITCH, "help": "exit with code 0 even if more than 10 %% of the tokens change"},
    "--no-report": {**_SWITCH, "help": "write no report; changed tokens are still counted and printed"},
}  # fmt: skip


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe quantize BUNDLE OUT`."""
    parser.description = "Quantize a float32 bundle into a new bundle and report what quantization costs and saves."
    parser.add_argument("bundle", help="folder of a float32 bundle")
    parser.add_argument("out", help="folder to write the quantized bundle to")
    for group, options in ((parser, _OPTIONS), (parser.add_argument_group("for experts"), _FOR_EXPERTS)):
        for flag, settings in options.items():
            group.add_argument(flag, **settings)
    parser.set_defaults(run=run_quantize)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe inspect BUNDLE`."""
    parser.add_argument("bundle", help="folder of the bundle; demo: the demo model")
    parser.add_argument("-f", "--format", choices=("txt", "json"), default="txt", help="default: txt")
    parser.set_defaults(run=run_inspect)


def run_quantize(args: argparse.Namespace) -> int:
    """Quantize a bundle; print the report and the changes. Return exit code 3 if severe changes are not accepted."""
    from u2moe.quantize.changes import MOST, changes_unreported, describe_changes, is_severe
    from u2moe.quantize.quantizer import quantize_bundle
    from u2moe.quantize.report import describe
    from u2moe.runtime.bundle_folder import Bundle
    from u2moe.runtime.cli.terminal import show_latest, show_progress, warn
    from u2moe.runtime.errors import QuantizationError

    measured, heard = _measured(args), _calibration(args)
    goal = Goal(resume=args.resume, **_limits(args))
    searches = args.recipe is None and heard and goal.limits
    smallest, groups = ("int4", {"output_layers": "int4"}) if searches else ("int8", {})
    groups |= _pairs("--group", args.group)
    exceptions = {**_formats_in(args.layers), **_pairs("--layer", args.layer)}
    name = args.recipe or smallest
    chosen = recipe(name, groups, packed=args.packed, exceptions=exceptions, calibration=heard)
    if args.dry_run:
        return _dry_run(args, chosen, goal)
    try:
        bundle, report = quantize_bundle(
            find_bundle(args.bundle), args.out, chosen, goal=goal, overwrite=args.overwrite, progress=show_latest,
            audio=[item.path for item in measured if not item.transcript],
            recordings=[item for item in measured if item.transcript],
        )  # fmt: skip
    except QuantizationError as error:
        if error.report is not None:
            print(describe(error.report))
        raise
    finally:
        show_progress("")
    if report is not None:
        print(describe(report))
    size = sum(file.size for file in bundle.manifest.files.values())
    print(f"wrote {bundle.path} ({size / 1e6:.1f} MB)")
    source = Bundle.open(find_bundle(args.bundle))
    changes = report["changes"] if report else changes_unreported(source, bundle, heard)
    print(*describe_changes(changes), sep="\n")
    if repair := _repair(args):
        print(f"to change fewer tokens: {repair}")
    if not is_severe(changes) or args.accept_damage:
        return 0
    warn(f"{bundle.path}: more than {MOST:.0%} of the tokens change; use --accept-damage for exit code 0")
    return 3


def _dry_run(args: argparse.Namespace, chosen: Recipe, goal: Goal) -> int:
    """Print the sizes of what would be written."""
    from u2moe.quantize.quantizer import sizes_of
    from u2moe.quantize.report import describe_bytes
    from u2moe.runtime.cli.terminal import show_latest, show_progress

    if goal.limits:
        raise ValueError("--dry-run measures nothing and cannot be combined with limits, which need measurements")
    sizes = sizes_of(find_bundle(args.bundle), args.out, chosen, overwrite=args.overwrite, progress=show_latest)
    show_progress("")
    print(*describe_bytes(sizes, {}), sep="\n")
    print(f"would write {args.out} ({sizes['files']['after'] / 1e6:.1f} MB, without a report)")
    return 0


def _limits(args: argparse.Namespace) -> dict[str, float]:
    """Return the given limits in the units of `Goal`, by field. Errors name the option and its unit."""
    limits = {}
    for name, (flag, _, factor, _) in _LIMITS.items():
        if (value := getattr(args, name)) is not None:
            declared = options_of(Goal)[name]
            above, most = (None if limit is None else limit / factor for limit in (declared.above, declared.most))
            limits[name] = checked_number(flag, value, above=above, most=most) * factor
    return limits


def _repair(args: argparse.Namespace) -> str:
    """Return a command that would make a bundle with less damage; "" if a limit on damage or divergence was given."""
    if args.max_damage is not None or args.max_divergence is not None:
        return ""
    if args.recipe == "fp16":
        args = argparse.Namespace(**{**vars(args), "recipe": None})
    kept = [("--recipe", args.recipe), *(("--group", group) for group in args.group), ("--list", args.list)]
    options = [part for pair in kept if pair[1] for part in pair] + ["--packed"] * args.packed
    flag, files = ("--calibration", [args.calibration]) if args.calibration else ("--calibrate", args.calibrate)
    limit = ["--max-damage", "2"] if files else []
    files = [str(file) for file in files] or ["RECORDINGS"]
    return shlex.join(["u2moe", "quantize", args.bundle, args.out, *options, "--overwrite", flag, *files, *limit])


def _measured(args: argparse.Namespace) -> list[Recording]:
    """Return the recordings for the report; by default the demo model's clips, if installed."""
    from u2moe.runtime.corpus.lists import read_recordings

    clips = DEMO_FOLDER / "clips"
    if args.no_report:
        if args.list:
            raise ValueError("--list names recordings for the report and cannot be combined with --no-report")
        return []
    return read_recordings(args.list or clips) if args.list or clips.is_dir() else []


def run_inspect(args: argparse.Namespace) -> int:
    """Inspect a bundle and print its content."""
    from u2moe.quantize.inspection import describe, inspect_bundle

    content = inspect_bundle(find_bundle(args.bundle))
    print(json.dumps(content, indent=1) if args.format == "json" else describe(content))
    return 0


def _calibration(args: argparse.Namespace) -> list[Path]:
    """Return the recordings for calibration, including those in folders and lists, or the file with their features."""
    from u2moe.quantize.recordings import KEPT, keep_calibration
    from u2moe.runtime.audio.files import find_audio
    from u2moe.runtime.corpus.lists import read_recordings

    found: list[Path] = []
    for path in args.calibrate:
        found += [item.path for item in read_recordings(path)] if path.suffix == ".tsv" else find_audio([path])
    if args.calibration is None:
        return found
    if args.calibration.suffix != KEPT:
        raise ValueError(f"--calibration must name a {KEPT} file, got {args.calibration}")
    if found:
        keep_calibration(find_bundle(args.bundle), found, args.calibration)
    return [args.calibration]


def _pairs(flag: str, pairs: list[str]) -> dict[str, str]:
    result = {}
    for pair in pairs:
        name, equals, kind = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} must be {flag[2:].upper()}=FORMAT, got {pair!r}")
        if name in result:
            raise ValueError(f"{flag} must name each {flag[2:]} at most once, got {name} twice")
        result[name] = kind
    return result


def _formats_in(file: Path | None) -> dict[str, str]:
    """Read a JSON file that maps layers to formats."""
    content = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(kind, str) for kind in content.values()):
        raise ValueError(f"{file}: must be a JSON object that maps layer names to formats")
    return content
