"""The sub-commands export and validate: parse, one call, print. Imports torch and onnx only when one runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from u2moe.export.comparison import ParityReport

Subparsers = Any  # argparse has no public name for it

_PROFILES = ("streaming", "offline", "clip", "ort")
_ORT_HELP = "also write the graphs in ORT format, and the operators that a reduced build of onnxruntime needs"


def add_export(subparsers: Subparsers) -> None:
    """`u2moe export CHECKPOINT OUT`."""
    parser = subparsers.add_parser(
        "export",
        help="turn a WeNet checkpoint into a bundle of ONNX graphs, checked against torch",
        description="Export a WeNet U2++ checkpoint (train.yaml, units.txt, final.pt) to ONNX. Ends with a comparison "
        "of torch and onnxruntime; a bundle that differs by more than 1e-4 is not written. With --profile sherpa-onnx "
        "write the encoder and CTC head as the graphs that sherpa-onnx's WeNet clients load, from a checkpoint or a "
        "bundle, quantized or not; the other profiles are those of u2moe convert.",
    )
    parser.add_argument("checkpoint", help="directory with train.yaml, units.txt and the weights")
    parser.add_argument("out", help="folder to write the bundle to")
    parser.add_argument(
        "--profile",
        choices=("bundle", "sherpa-onnx", *_PROFILES),
        default="bundle",
        help="what will run the graphs: u2moe (a bundle, the default), sherpa-onnx, or another program",
    )
    parser.add_argument("--ort", action="store_true", help=_ORT_HELP)
    parser.add_argument(
        "--padding",
        type=float,
        metavar="S",
        help="for a bundle: seconds of silence around recordings that are cut off in a sound (default: 0, as in WeNet)",
    )
    parser.add_argument("--chunk-size", type=int, metavar="N", help="for sherpa-onnx's online graph (default: 16)")
    parser.add_argument("--left-chunks", type=int, metavar="N", help="for sherpa-onnx's online graph (default: 4)")
    parser.add_argument(
        "--only", choices=("online", "offline"), help="write only one of sherpa-onnx's two graphs (default: both)"
    )
    _add_files(parser)
    _add_writing(parser, "a bundle")
    parser.set_defaults(run=run_export)


def add_convert(subparsers: Subparsers) -> None:
    """`u2moe convert BUNDLE OUT`."""
    parser = subparsers.add_parser(
        "convert",
        help="make one graph of a bundle, for programs that want fewer",
        description="Make fewer graphs of a bundle, quantized or not, and prove them equal to it. streaming: one chunk "
        "of samples and caches in, log-probabilities, encoder frames and caches out. offline: samples in, greedy "
        "tokens, times and log-probabilities out. clip: bytes of a WAV, FLAC or MP3 file of less than 30 seconds in, "
        "text out, with onnxruntime-extensions. ort: the graphs of the bundle as they are, in ORT format.",
    )
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--profile", choices=_PROFILES, required=True)
    parser.add_argument("--ort", action="store_true", help=_ORT_HELP)
    _add_writing(parser, "a folder of this kind")
    parser.set_defaults(run=run_convert)


def add_validate(subparsers: Subparsers) -> None:
    """`u2moe validate BUNDLE`."""
    parser = subparsers.add_parser(
        "validate",
        help="check a bundle: digests, contract, and parity with its checkpoint",
        description="Check every file of a bundle against its manifest and every graph against its contract; "
        "with --checkpoint compare the graphs with torch too.",
    )
    parser.add_argument("bundle", help="folder of the bundle")
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint directory the bundle was exported from")
    _add_files(parser)
    _add_quiet(parser)
    parser.set_defaults(run=run_validate)


def _add_writing(parser: argparse.ArgumentParser, target: str) -> None:
    """Options for what is written, and told."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {target} that is already there")
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print the summary only")


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Options for checkpoint files with other names or in other places."""
    parser.add_argument(
        "--weights", metavar="FILE", help="state dict, in the checkpoint directory or elsewhere (default: final.pt)"
    )
    parser.add_argument(
        "--units",
        metavar="FILE",
        help="vocabulary, in the checkpoint directory or elsewhere (default: as named in train.yaml, or units.txt)",
    )


def run_export(args: argparse.Namespace) -> int:
    """Export and print what was compared."""
    if args.padding is not None and args.profile != "bundle":
        raise ValueError("--padding is for a bundle: other programs add silence themselves")
    if args.profile == "sherpa-onnx":
        return _run_sherpa(args)
    if args.profile != "bundle":
        return _run_profile(args)
    from u2moe.export.exporter import export_bundle

    for name in ("chunk_size", "left_chunks", "only"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} needs --profile sherpa-onnx: a bundle is not limited to one setting"
            )
    if args.ort:
        raise ValueError("--ort needs a profile; 'u2moe convert BUNDLE OUT --profile ort' has the graphs of a bundle")
    bundle, report = export_bundle(
        args.checkpoint,
        args.out,
        weights=args.weights,
        units=args.units,
        padding_s=args.padding or 0.0,
        overwrite=args.overwrite,
        progress=_printer(args.quiet),
    )
    _print_report(report, quiet=args.quiet)
    size = sum(file.size for file in bundle.manifest.files.values())
    print(f"wrote {bundle.path} ({size / 1e6:.1f} MB)")
    return 0


def _run_sherpa(args: argparse.Namespace) -> int:
    """Write the graphs for sherpa-onnx, and print how to load them."""
    from u2moe.export.sherpa import export_sherpa
    from u2moe.export.sherpa_graphs import SherpaOptions

    given = {"chunk_size": args.chunk_size, "num_left_chunks": args.left_chunks, "only": args.only}
    options = SherpaOptions(**{name: value for name, value in given.items() if value is not None})
    written = export_sherpa(
        args.checkpoint,
        args.out,
        options,
        weights=args.weights,
        units=args.units,
        overwrite=args.overwrite,
        progress=_printer(args.quiet),
    )
    _print_report(written.report, quiet=args.quiet)
    print(f"wrote {written.path}; to load it:")
    print(written.usage())
    return 0


def _run_profile(args: argparse.Namespace) -> int:
    """Write a profile from a checkpoint, by way of a bundle that is discarded, or from a bundle."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from u2moe.runtime.bundle.manifest import MANIFEST_FILE

    if (Path(args.checkpoint) / MANIFEST_FILE).is_file():
        return _convert(args, args.checkpoint)
    from u2moe.export.exporter import export_bundle

    with TemporaryDirectory() as folder:
        bundle, _ = export_bundle(
            args.checkpoint,
            Path(folder) / "bundle",
            weights=args.weights,
            units=args.units,
            progress=_printer(args.quiet),
        )
        return _convert(args, bundle.path)


def run_convert(args: argparse.Namespace) -> int:
    """Convert a bundle and print what was compared."""
    return _convert(args, args.bundle)


def _convert(args: argparse.Namespace, bundle: str | Path) -> int:
    from u2moe.export.profiles.conversion import convert_bundle

    written = convert_bundle(
        bundle, args.out, args.profile, ort=args.ort, overwrite=args.overwrite, progress=_printer(args.quiet)
    )
    _print_report(written.report, quiet=args.quiet)
    print(f"wrote {written.path}: {', '.join(written.files)}")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Validate and print what was checked."""
    from u2moe.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(args.bundle)
    bundle.load()
    print(f"{bundle.path}: {len(bundle.manifest.files)} files match their sha256, all graphs match their contract")
    if args.checkpoint is not None:
        from u2moe.export.exporter import validate_bundle

        report = validate_bundle(
            args.bundle, args.checkpoint, weights=args.weights, units=args.units, progress=_printer(args.quiet)
        )
        _print_report(report, quiet=args.quiet)
    return 0


def _printer(quiet: bool) -> Any:
    return (lambda _: None) if quiet else (lambda line: print(f"- {line}", file=sys.stderr))


def _print_report(report: ParityReport, *, quiet: bool) -> None:
    if not quiet:
        width = max(len(item.case) for item in report.comparisons)
        for item in report.comparisons:
            print(f"{item.case:{width}}  {item.tensor:14} {item.difference:9.2e} of {item.limit:.1e}")
    for layer, counts in () if quiet else report.tokens_per_expert.items():
        print(f"{layer}: tokens per expert {counts}")
    worst = report.worst
    print(
        f"{report.sides} agree in {len(report.comparisons)} comparisons of "
        f"{sum(item.num_values for item in report.comparisons):,} values; closest to its limit: "
        f"{worst.tensor} in {worst.case}, {worst.difference:.2e} of {worst.limit:.1e}"
    )
    if report.num_redrawn:
        print(f"{report.num_redrawn} inputs hit a near tie in a router and were replaced")
