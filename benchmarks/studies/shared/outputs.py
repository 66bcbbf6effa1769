"""The outputs of a bundle for recordings on one processor: a process of `processors` that imports only the runtime.

    python outputs.py BUNDLE SAMPLES.npz OUT.npz

It may run in an emulator, with a different interpreter and packages from those of the process that started it.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime import Bundle, Model, attention_rescoring, ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.model.features import fbank

Array = npt.NDArray[Any]

CONTEXTS: dict[str, int | None] = {"full context": None, "chunk 16": 16}
"""Encoder frames per chunk by the name of the context."""
BEAM_SIZE = 10


def describe_process() -> dict[str, Any]:
    """The processor and software."""
    return {
        "architecture": platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }


def outputs(bundle: Bundle, model: Model, samples: Array) -> Iterator[tuple[str, Array, str]]:
    """For each context: its name, log-probabilities [time, vocab], and the text of the model's last pass."""
    frames = fbank(samples, bundle.manifest.features)
    for name, chunk_size in CONTEXTS.items():
        if chunk_size is None or model.config.streaming:
            encoder_out = model.encode(frames, chunk_size)
            log_probs = model.ctc(encoder_out)
            yield name, log_probs, bundle.vocabulary.text(best_tokens(bundle, model, encoder_out, log_probs))


def best_tokens(bundle: Bundle, model: Model, encoder_out: Array, log_probs: Array) -> Sequence[int]:
    """The best tokens of the second pass, or of a greedy search without one."""
    if not model.has_decoder or not len(encoder_out):
        return ctc_greedy_search(log_probs, model.config.blank).tokens
    beam = ctc_prefix_beam_search(log_probs, BEAM_SIZE, model.config.blank)
    scores = model.token_scores(encoder_out, [hypothesis.tokens for hypothesis in beam])
    decoding = bundle.manifest.decoding
    return attention_rescoring(beam, scores, decoding.ctc_weight, decoding.reverse_weight)[0].hypothesis.tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Read samples; write log-probabilities as "context/number", and everything else as JSON in "about"."""
    folder, source, target = sys.argv[1:] if arguments is None else arguments
    bundle = Bundle.open(folder)
    model = bundle.load()
    arrays: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    with np.load(source) as recordings:
        for number in range(len(recordings.files)):
            for name, log_probs, text in outputs(bundle, model, recordings[str(number)]):
                arrays[f"{name}/{number}"] = log_probs
                texts.setdefault(name, []).append(text)
    about = json.dumps({"process": describe_process(), "texts": texts})
    with Path(target).open("wb") as file:
        np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
