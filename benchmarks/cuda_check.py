"""Does a bundle say the same on a GPU as on the CPU, and how fast? For machines with onnxruntime-gpu.

    python -m u2moe.benchmarks.cuda_check FLOAT32_BUNDLE FP16_BUNDLE AUDIO...

Compares encoder output, log-probabilities and second-pass scores of the fp16 bundle on CUDA with the float32 bundle on
the CPU, and times both encoders. Exits with 1 when a difference is beyond the limit, or the provider is not at work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.report import features_of
from u2moe.runtime import Bundle, Model, ctc_prefix_beam_search

LIMIT = 0.05
"""Relative error of the encoder output: half precision rounds to 0.05 % in each of some hundred layers, and a router
that is nearly undecided may choose another expert."""
NUM_TIMINGS = 10


def seconds(model: Model, frames: np.ndarray[tuple[int, int], np.dtype[np.float32]], chunk_size: int | None) -> float:
    """Median time of the encoder; the first call is not counted."""
    times = []
    for _ in range(NUM_TIMINGS + 1):
        start = time.perf_counter()
        model.encode(frames, chunk_size, 4)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.cuda_check", description=__doc__.splitlines()[0])
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
        before, after = seconds(reference, longest, chunk_size), seconds(model, longest, chunk_size)
        name = "full context" if chunk_size is None else f"chunk {chunk_size}"
        print(
            f"encoder, {name}: float32 on the CPU {before * 1e3:.1f} ms, fp16 on {args.provider} {after * 1e3:.1f} ms"
        )
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
