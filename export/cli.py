"""The sub-commands `export`, `convert` and `validate`. torch and onnx are imported only when a sub-command runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.cli.terminal import tell

if TYPE_CHECKING:
    from u2moe.export.comparison import ParityReport

PROFILES = ("streaming", "offline", "clip", "ort", "sherpa-onnx", "static")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe export CHECKPOINT OUT`."""
    parser.description = (
        "Export a WeNet U2++ checkpoint (train.yaml, units.txt, final.pt) to ONNX, and compare the graphs "
        "with torch. If a difference exceeds its limit (1e-4 for values up to 1), no bundle is written."
    )
    parser.add_argument("checkpoint", help="directory with train.yaml, units.txt and the weights")
    parser.add_argument("out", help="folder to write the bundle to")
    random_help = "use random weights, for measuring only; CHECKPOINT may be just a train.yaml"
    parser.add_argument("--random", action="store_true", help=random_help)
    sizes = "vocabulary size with --random (default: as in train.yaml, or 5000)"
    parser.add_argument("--vocab-size", type=int, metavar="N", help=sizes)
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the random weights (default: 0)")
    padding = "seconds of silence to add where a recording starts or ends within a sound (default: 0, as in WeNet)"
    parser.add_argument("--padding", type=float, metavar="S", default=0.0, help=padding)
    _add_files(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.set_defaults(run=run_export)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe convert BUNDLE OUT`."""
    parser.description = (
        "Convert a bundle to fewer graphs or another format, and compare the result with the bundle. "
        "All profiles except static accept quantized bundles. "
        "streaming: caches and one chunk of samples in; log-probabilities, encoder frames and caches out. "
        "offline: samples in; greedy tokens, times and log-probabilities out. "
        "clip: a WAV, FLAC or MP3 file shorter than 30 seconds in, text out; needs onnxruntime-extensions. "
        "ort: the graphs of the bundle, unchanged, in ORT format. "
        "sherpa-onnx: encoder and CTC head for the WeNet clients of sherpa-onnx. "
        "static: encoder and CTC head for one chunk, as one graph of fixed shapes for NPUs, in a folder that is also "
        "a bundle."
    )
    parser.add_argument("bundle", help="folder of the bundle; demo: the demo model")
    parser.add_argument("out", help="folder to write the graphs to")
    parser.add_argument("--profile", choices=PROFILES, required=True)
    ort_help = "also write ORT format, and the list of operators for a reduced build of onnxruntime"
    parser.add_argument("--ort", action="store_true", help=ort_help)
    chunk_help = "for sherpa-onnx and static: encoder frames per chunk (default: 16)"
    parser.add_argument("--chunk-size", type=int, metavar="N", help=chunk_help)
    left_help = "for sherpa-onnx and static: chunks of left context (default: 4)"
    parser.add_argument("--num-left-chunks", type=int, metavar="N", help=left_help)
    recordings = parser.add_mutually_exclusive_group()
    calibration = "for static: also write chunks of these recordings as calibration data"
    recordings.add_argument("--calibration", nargs="+", metavar="FILE", help=calibration)
    qdq = "for static: like --calibration, and also use the chunks to quantize the graph for QNN"
    recordings.add_argument("--qdq", nargs="+", metavar="FILE", help=qdq)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder of this kind")
    parser.set_defaults(run=run_convert)


def add_validate(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe validate BUNDLE`."""
    parser.description = (
        "Check every file of a bundle against the manifest, and every graph against its contract; "
        "with --checkpoint, also compare the graphs with torch."
    )
    parser.add_argument("bundle", help="folder of the bundle; demo: the demo model")
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint directory that the bundle was exported from")
    _add_files(parser)
    parser.set_defaults(run=run_validate)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Add options for checkpoint files with other names or in other places, and for LoRA adapters."""
    weights = "state dict, in the checkpoint directory or elsewhere (default: final.pt)"
    parser.add_argument("--weights", metavar="FILE", help=weights)
    parser.add_argument(
        "--units",
        metavar="FILE",
        help="vocabulary, in the checkpoint directory or elsewhere (default: the one that train.yaml names, else "
        "units.txt, lang_char.txt or words.txt)",
    )
    parser.add_argument(
        "--lora",
        choices=("add", "contained"),
        help="add: add the LoRA adapters in the state dict to its weights; contained: the weights already include them "
        "(default: contained for epoch_N.pt, add for step_N.pt)",
    )


def run_export(args: argparse.Namespace) -> int:
    """Export a checkpoint and print the result."""
    from u2moe.export.exporter import export_bundle, export_random

    common = {"overwrite": args.overwrite, "progress": tell}
    given = _given(vocab_size=args.vocab_size, seed=args.seed)
    files = {"weights": args.weights, "units": args.units, "lora": args.lora}
    if args.random:
        if any((*files.values(), args.padding)):
            raise ValueError("--random cannot be combined with --weights, --units, --lora or --padding")
        bundle = export_random(args.checkpoint, args.out, **given, **common)
    else:
        if given:
            raise ValueError("--vocab-size and --seed require --random")
        bundle, report = export_bundle(args.checkpoint, args.out, **files, padding_s=args.padding, **common)
        _print_report(report)
    size = sum(file.size for file in bundle.manifest.files.values())
    print(f"wrote {bundle.path} ({size / 1e6:.1f} MB)")
    return 0


def _given(**options: int | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def run_convert(args: argparse.Namespace) -> int:
    """Convert a bundle, and print how closely the new graphs match it."""
    options = _given(chunk_size=args.chunk_size, num_left_chunks=args.num_left_chunks)
    is_static, is_sherpa = args.profile == "static", args.profile == "sherpa-onnx"
    if args.ort and is_sherpa:
        raise ValueError("--ort does not apply to --profile sherpa-onnx: sherpa-onnx does not read ORT format")
    if options and not (is_static or is_sherpa):
        raise ValueError("--chunk-size and --num-left-chunks require --profile sherpa-onnx or static")
    bundle, common = find_bundle(args.bundle), {"overwrite": args.overwrite, "progress": tell}
    if is_sherpa:
        from u2moe.export import SherpaOptions, export_sherpa

        exported = export_sherpa(bundle, args.out, SherpaOptions(**options), **common)
        _print_report(exported.report)
        print(f"wrote {exported.path}; to load it:\n{exported.usage()}")
        return 0
    if not is_static and (args.qdq or args.calibration):
        raise ValueError("--calibration and --qdq require --profile static")
    if args.ort and is_static:
        raise ValueError("--ort does not apply to --profile static, whose graph is for NPU compilers")
    from u2moe.export import convert_bundle, convert_static

    if is_static:
        options |= {"recordings": args.qdq or args.calibration or (), "qdq": args.qdq is not None}
        written = convert_static(bundle, args.out, **options, **common)
    else:
        written = convert_bundle(bundle, args.out, args.profile, ort=args.ort, **common)
    _print_report(written.report)
    print(f"wrote {written.path}: {', '.join(written.files)}")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Validate a bundle and print the results."""
    from u2moe.runtime.bundle_folder import Bundle

    bundle = Bundle.open(find_bundle(args.bundle))
    bundle.load()
    print(f"{bundle.path}: {len(bundle.manifest.files)} files match their sha256, and all graphs match their contract")
    if args.checkpoint is not None:
        from u2moe.export.exporter import validate_bundle

        files = {"weights": args.weights, "units": args.units, "lora": args.lora}
        _print_report(validate_bundle(bundle.path, args.checkpoint, **files, progress=tell))
    elif args.weights or args.units or args.lora:
        raise ValueError("--weights, --units and --lora need --checkpoint")
    return 0


def _print_report(report: ParityReport) -> None:
    """Print the summary to stdout. The comparisons and tokens per expert go to stderr, like progress messages."""
    width = max(len(item.case) for item in report.comparisons)
    for item in report.comparisons:
        tell(f"{item.case:{width}}  {item.tensor:14} {item.difference:9.2e} of {item.limit:.1e}")
    for layer, counts in report.tokens_per_expert.items():
        tell(f"{layer}: tokens per expert {counts}")
    worst = report.worst
    print(
        f"{report.sides} agree in {len(report.comparisons)} comparisons of "
        f"{sum(item.num_values for item in report.comparisons):,} values; closest to its limit: "
        f"{worst.tensor} in {worst.case}, {worst.difference:.2e} of {worst.limit:.1e}"
    )
    if report.num_redrawn:
        print(f"{report.num_redrawn} inputs hit a near tie in a router and were drawn again")
