"""Finds the best language model weights on `queen-dev` for each beam, with full context and in chunks of 16.

    python weights.py BUNDLE [--beams 10 20 40]

Prints word errors of both passes without a language model, and the fewest with one. `u2moe lm tune` does the same, but
only with full context.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Never

from spelling import normalize

from u2moe.runtime import Bundle, SessionSettings
from u2moe.runtime.audio.padding import padded
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.decoding.language_model_weights import EncodedRecordings, tune
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.model.features import fbank
from u2moe.runtime.options import BundledOptions
from u2moe.runtime.text.word_errors import WordErrors

CHUNK_SIZES = (None, 16)
GRID = {
    "weight": (0.2, 0.3, 0.4, 0.5, 0.7),
    "word_bonus": (0.5, 1.0, 1.5, 2.0),
    "rescoring_weight": (0.25, 0.5, 0.75, 1.0),
}
"""Values that are tried for the errors of the second pass, after each pass has been tuned separately."""


class Contexts(EncodedRecordings):
    """The same recordings in every context."""

    def encode(self, manifest: Path) -> None:
        """Add the recordings of a list."""
        config = self._bundle.manifest
        features, padding_s = config.features, config.decoding.padding_s
        for recording in read_recordings(manifest):
            samples = read_audio(recording.path, features.sample_rate)
            frames = fbank(padded(samples, padding_s, features.sample_rate, features.frame_len), features)
            for chunk_size in CHUNK_SIZES:
                self.add_encoded(recording.transcript, self._model.encode(frames, chunk_size))

    def word_errors(
        self, options: LanguageModelOptions | None, decoding: BundledOptions[Never] | None = None, *, second_pass: bool
    ) -> WordErrors:
        """Return word errors of all recordings, in the spelling of the recipe."""
        errors = WordErrors()
        texts = self.texts(options, decoding, second_pass=second_pass)
        for recording, text in zip(self.recordings, texts, strict=True):
            errors.add(recording.transcript, normalize(text))
        return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    model = bundle.load(SessionSettings(num_threads=1, kernels="onnxruntime"))
    start = bundle.language_model()
    if start is None:
        parser.error(f"{args.bundle} has no language model")
    for beam_size in args.beams:
        recordings = Contexts(bundle, model, replace(bundle.manifest.decoding, beam_size=beam_size))
        recordings.encode(args.work_dir / "dev" / "queen-dev.tsv")
        best, decoding, trials = tune(recordings, start, second_pass=False)
        best, decoding, trials = tune(recordings, best, decoding, second_pass=True)
        best, decoding, last = tune(recordings, best, decoding, second_pass=True, grid=GRID)
        fewest = min(trial.num_errors for trial in last)
        print(f"beam {beam_size}: {trials[0].num_errors} of {trials[0].num_words}, {fewest} with", end=" ")
        print({name: getattr(best, name) for name in (*GRID, "unknown_score")}, decoding.blank_penalty, flush=True)


if __name__ == "__main__":
    main()
