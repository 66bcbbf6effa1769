"""Does a bundle give the same results on a GPU as on the CPU, and how fast? For machines with onnxruntime-gpu.

    python -m u2moe.benchmarks.studies.gpu FLOAT32_BUNDLE FP16_BUNDLE AUDIO...

Compares encoder output, log-probabilities and second-pass scores of the fp16 bundle on CUDA with the float32 bundle on
the CPU, and times both encoders. Exits with 1 if a difference exceeds the limit or the provider is not in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from u2moe.benchmarks.instruments.statistics import Spread, interleaved, timed
from u2moe.benchmarks.results.markdown import quartiles
from u2moe.benchmarks.studies.shared.script import run_script, script_parser
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.report import features_of
from u2moe.runtime import Bundle, ctc_prefix_beam_search

LIMIT = 0.05
"""Relative error of the encoder output: half precision rounds to 0.05 % in each of about a hundred layers, and a router
near a tie may choose another expert."""
NUM_TIMINGS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = script_parser("studies.gpu", __doc__)
    parser.add_argument("float32", type=Path, help="folder of the float32 bundle")
    parser.add_argument("fp16", type=Path, help="folder of the bundle that `u2moe quantize --recipe fp16` made of it")
    parser.add_argument("audio", type=Path, nargs="+")
    parser.add_argument("--provider", default="CUDAExecutionProvider", help="default: CUDAExecutionProvider")
    args = parser.parse_args(arguments)
    source = Bundle.open(args.float32)
    reference, model = source.load(), Bundle.open(args.fp16).load(providers=[args.provider])
    worst = 0.0
    features = features_of(source, args.audio)
    for frames in features:
        expected, found = reference.encode(frames), model.encode(frames)
        worst = max(worst, relative_error(expected, found))
        log_probs = reference.ctc(expected), model.ctc(found)
        print(
            f"{len(frames)} frames: encoder output differs by {relative_error(expected, found):.3%}, "
            f"best token is the same in {(log_probs[0].argmax(axis=1) == log_probs[1].argmax(axis=1)).mean():.2%}"
        )
        if reference.has_decoder:
            hypotheses = [item.tokens for item in ctc_prefix_beam_search(log_probs[0], 10)]
            scores = reference.rescore(expected, hypotheses), model.rescore(found, hypotheses)
            print(f"  second pass differs by at most {np.abs(scores[0][0] - scores[1][0]).max():.3f}")
    longest = max(features, key=len)
    for chunk_size in (None, 16) if reference.config.streaming else (None,):
        models = {"float32 on the CPU": reference, f"fp16 on {args.provider}": model}
        name = "full context" if chunk_size is None else f"chunk {chunk_size}"
        cases = {where: timed(partial(item.encode, longest, chunk_size, 4)) for where, item in models.items()}
        for where, seconds in interleaved(cases, NUM_TIMINGS).items():
            print(f"encoder, {name}, {where}: {quartiles(Spread.of([1e3 * value for value in seconds]), 1)} ms")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    run_script(main)
