"""Do native kernels change what is recognised? Texts, tokens and frames of recordings with them and without.

    python -m u2moe.benchmarks.studies.native_texts MANIFEST... [--bundle FOLDER] [--results FILE]

Manifests are lines of "path TAB transcript". Each recording is recognised with full context and in chunks of 16 frames.
The most likely token of each frame (of the CTC head) is compared, too: texts hide most of what changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.runtime import Bundle, DecodingOptions, Recognizer, SessionSettings
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.model.features import fbank
from u2moe.runtime.places import DEMO_FOLDER
from u2moe.runtime.text.word_errors import WordErrors

KERNELS = ("native", "onnxruntime")
MODES: Mapping[str, DecodingOptions] = {
    "full context": DecodingOptions(),
    "chunk 16, left 4": DecodingOptions(chunk_size=16, num_left_chunks=4),
}


def compare(
    bundle: Bundle, recordings: Sequence[Recording], *, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Recognise all recordings with native kernels and without.

    Args:
        bundle: a quantized bundle.
        recordings: recordings with transcripts.
        progress: called with a line for every hundredth recording.

    Returns:
        kernels: see `Kernels.data`; modes: for each mode, the number of `recordings`, of those with `other_tokens` in
        the result, and of those with other n-best lists (`other_lists`); the number of `frames`, and of those with
        another token as the most likely one (`flips`); the word error rates, `words`.

    Raises:
        KernelsError: u2moe-kernels is not installed or cannot run here.
    """
    recognizers = {kernels: Recognizer(bundle, bundle.load(SessionSettings(kernels=kernels))) for kernels in KERNELS}
    counts = {mode: Counter[str]() for mode in MODES}
    words = {mode: {kernels: WordErrors() for kernels in KERNELS} for mode in MODES}
    rate = bundle.manifest.features.sample_rate
    for number, recording in enumerate(recordings):
        if number % 100 == 0:
            progress(f"recording {number + 1} of {len(recordings)}")
        samples = read_audio(recording.path, rate)
        frames = fbank(samples, bundle.manifest.features)
        for mode, options in MODES.items():
            found = [recognizers[kernels].transcribe(samples, options=options) for kernels in KERNELS]
            for kernels, transcript in zip(KERNELS, found, strict=True):
                words[mode][kernels].add(recording.transcript, transcript.text)
            tokens = [[segment.tokens for segment in each.segments] for each in found]
            nbest = [[item.tokens for segment in each.segments for item in segment.nbest] for each in found]
            best = [_best_tokens(recognizers[kernels], frames, options) for kernels in KERNELS]
            counts[mode].update(
                recordings=1,
                other_tokens=tokens[0] != tokens[1],
                other_lists=nbest[0] != nbest[1],
                frames=len(best[0]),
                flips=int((best[0] != best[1]).sum()),
            )
    return {
        "kernels": recognizers[KERNELS[0]].model.kernels.data(),
        "modes": {
            mode: {**counts[mode], "words": {kernels: errors.rate for kernels, errors in words[mode].items()}}
            for mode in MODES
        },
    }


def _best_tokens(recognizer: Recognizer, frames: np.ndarray[Any, Any], options: DecodingOptions) -> Any:
    """The most likely token of each encoder frame."""
    model = recognizer.model
    return model.ctc(model.encode(frames, options.chunk_size, options.num_left_chunks)).argmax(axis=1)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show."""
    rows = [
        (
            mode,
            item["recordings"],
            item["other_tokens"],
            item["other_lists"],
            f"{item['flips']} of {item['frames']}",
            *(f"{item['words'][kernels]:.2%}" for kernels in KERNELS),
        )
        for mode, item in results["modes"].items()
    ]
    header = (
        "",
        "recordings",
        "other text",
        "other n-best list",
        "frames with another token",
        "word errors",
        "without",
    )
    items = results["modes"].values()
    changes = [abs(item["words"][KERNELS[0]] - item["words"][KERNELS[1]]) for item in items]
    return {
        "table": table(header, rows),
        "kernels": results["kernels"]["description"],
        "recordings": str(max(item["recordings"] for item in items)),
        "other": str(sum(item["other_tokens"] for item in items)),
        "cases": str(sum(item["recordings"] for item in items)),
        "points": f"{100 * max(changes):.2f}",
        "flips": f"{sum(item['flips'] for item in items) / sum(item['frames'] for item in items):.3%}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.native_texts", __doc__)
    parser.add_argument("manifests", nargs="+", help="lines of path<TAB>transcript")
    parser.add_argument("--bundle", type=Path, default=DEMO_FOLDER, help="default: the demo model")
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    args = parser.parse_args(arguments)
    recordings = [recording for manifest in args.manifests for recording in read_recordings(manifest)]
    found = compare(Bundle.open(args.bundle), recordings, progress=report)
    publish(args.bundle, found, values, args.results)


if __name__ == "__main__":
    run_script(main)
