"""Tune a bundle's language model weights and blank penalty. The recordings are encoded only once."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Never

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.padding import padded
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, BundledLanguageModel
from u2moe.runtime.bundle.signature import SIGNATURE_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.declarations import options_of
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.native_search import new_search
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.errors import BundleError, IntegrityError
from u2moe.runtime.language.files import write_compact
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.model import Model, TokenScores
from u2moe.runtime.options import BundledOptions
from u2moe.runtime.text.word_errors import WordErrors, words

FIRST_GRID: dict[str, tuple[float, ...]] = {
    "weight": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    "word_bonus": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5),
    "unknown_score": (-10.0, -5.0, -2.0),
    "blank_penalty": (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
}
"""Values to try in the first pass."""
SECOND_GRID: dict[str, tuple[float, ...]] = {"rescoring_weight": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)}
"""Values to try in the second pass, after the weights of the first pass are chosen."""
LONGEST_S = 60
"""Longest recording in seconds for `u2moe lm tune`: with full context, memory use grows with the square of the
length."""
LANGUAGE_MODEL_FILE = "language.lm"


@dataclass(eq=False)
class EncodedRecording:
    """A recording to search: reference text, encoder output [time, dim], and decoder scores by first-pass tokens."""

    transcript: str
    encoder_out: npt.NDArray[np.float32]
    scores: dict[tuple[tuple[int, ...], ...], TokenScores] = field(default_factory=dict)


class EncodedRecordings:
    """Recordings encoded with full context: a megabyte per minute. `decoding` defaults to the options of the bundle."""

    def __init__(self, bundle: Bundle, model: Model, decoding: BundledOptions[Never] | None = None) -> None:
        self.recordings: list[EncodedRecording] = []
        self.decoding = decoding or bundle.manifest.decoding
        self._bundle = bundle
        self._model = model

    @property
    def num_words(self) -> int:
        """Number of words in all transcripts."""
        return sum(len(words(recording.transcript)) for recording in self.recordings)

    def add(self, transcript: str, samples: npt.NDArray[np.float32]) -> None:
        """Encode and add a recording, given samples at the model's sample rate."""
        manifest = self._bundle.manifest
        rate, frame_len = manifest.features.sample_rate, manifest.features.frame_len
        surrounded = padded(samples, self.decoding.padding_s, rate, frame_len)
        self.add_encoded(transcript, self._model.encode(fbank(surrounded, manifest.features)))

    def add_encoded(self, transcript: str, encoder_out: npt.NDArray[np.float32]) -> None:
        """Add a recording, given encoder output [time, dim]."""
        if len(encoder_out):
            self.recordings.append(EncodedRecording(transcript, encoder_out))

    def texts(
        self, options: LanguageModelOptions | None, decoding: BundledOptions[Never] | None = None, *, second_pass: bool
    ) -> list[str]:
        """Return the text of every recording. Without `decoding`, the options used for encoding apply."""
        vocabulary, decoding, model = self._bundle.vocabulary, decoding or self.decoding, self._model
        library, size, penalty = model.search_library, decoding.beam_size, decoding.blank_penalty
        fusion = None if options is None else Fusion(options, vocabulary)
        weights = decoding.weights() if options is None else decoding.weights(options.rescoring_weight)
        texts = []
        for recording in self.recordings:
            search = new_search(library, size, model.config.blank, fusion=fusion, blank_penalty=penalty)
            search.advance(model.ctc(recording.encoder_out))
            search.finish()
            found = search.hypotheses()
            if second_pass:
                key = tuple(tuple(hypothesis.tokens) for hypothesis in found)
                if key not in recording.scores:
                    scores = model.token_scores(recording.encoder_out, key)
                    recording.scores[key] = dataclasses.replace(scores, next=np.zeros((0, 0), np.float32))
                found = [attention_rescoring(found, recording.scores[key], weights)[0].hypothesis]
            texts.append(vocabulary.text(found[0].tokens))
        return texts

    def word_errors(
        self, options: LanguageModelOptions | None, decoding: BundledOptions[Never] | None = None, *, second_pass: bool
    ) -> WordErrors:
        """Return the word errors of all recordings."""
        errors, texts = WordErrors(), self.texts(options, decoding, second_pass=second_pass)
        for recording, text in zip(self.recordings, texts, strict=True):
            errors.add(recording.transcript, text)
        return errors


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Word errors with one choice of weights. Empty `weights`: no language model, and unchanged decoding options."""

    weights: dict[str, float]
    num_errors: int
    num_words: int


def tune(
    recordings: EncodedRecordings,
    start: LanguageModelOptions | None,
    decoding: BundledOptions[Never] | None = None,
    *,
    second_pass: bool,
    grid: dict[str, tuple[float, ...]] | None = None,
    on_trial: Callable[[Trial], object] = lambda _: None,
) -> tuple[LanguageModelOptions | None, BundledOptions[Never], list[Trial]]:
    """Find the weights and decoding options with the fewest word errors, by coordinate descent in at most two rounds.

    `start` is the model and its initial weights; None: only decoding options, such as the blank penalty, are tuned.
    `decoding` are initial options; None: those with which the recordings were encoded. `second_pass`: whether to count
    the errors of the second pass. `grid` has values to try, by name of a weight or a decoding option that does not
    affect the encoder; None: `FIRST_GRID` or `SECOND_GRID`. `on_trial` is called with each trial.

    Returns the best language model options, the best decoding options, and all trials, the first without the model.
    """
    own, initial = options_of(BundledOptions), decoding or recordings.decoding
    grid = {name: values for name, values in (grid or (SECOND_GRID if second_pass else FIRST_GRID)).items()
            if start is not None or name in own}  # fmt: skip
    trials: dict[tuple[float, ...], Trial] = {}
    without = recordings.word_errors(None, second_pass=second_pass)
    first = Trial(weights={}, num_errors=without.num_errors, num_words=without.num_words)
    on_trial(first)

    def chosen(weights: dict[str, float]) -> tuple[LanguageModelOptions | None, BundledOptions[Never]]:
        of_model: dict[str, Any] = {name: value for name, value in weights.items() if name not in own}
        of_search: dict[str, Any] = {name: value for name, value in weights.items() if name in own}
        return start and dataclasses.replace(start, **of_model), dataclasses.replace(initial, **of_search)

    def errors_of(weights: dict[str, float]) -> int:
        key = tuple(weights.values())
        if key not in trials:
            errors = recordings.word_errors(*chosen(weights), second_pass=second_pass)
            trials[key] = Trial(weights=weights, num_errors=errors.num_errors, num_words=errors.num_words)
            on_trial(trials[key])
        return trials[key].num_errors

    best: dict[str, float] = {name: getattr(initial if name in own else start, name) for name in grid}
    for _ in range(2):
        before = best
        for name, values in grid.items():
            best = min([best, *({**best, name: value} for value in values)], key=errors_of)
        if before == best:
            break
    return *chosen(best), [first, *trials.values()]


def attach(folder: str | os.PathLike[str], model: LanguageModelOptions | None, **defaults: Any) -> Bundle:
    """Replace the language model of a bundle, in place; None: remove it. The graphs do not change.

    `defaults` are new defaults of `DecodingOptions`, by the field names of `BundledOptions`. Other defaults are kept.
    Raises BundleError if the folder is not a bundle, or contains other files, which would be lost; LanguageModelError
    if the model does not fit the vocabulary; ValueError if the model has classes, or a default is out of range.
    """
    bundle = Bundle.open(folder)
    kept, before = dict(bundle.manifest.files), bundle.manifest.decoding
    strangers = {file.name for file in bundle.path.iterdir()} - {MANIFEST_FILE, SIGNATURE_FILE, *kept}
    if strangers:
        raise BundleError(f"{bundle.path}: found {min(strangers)!r}, which would be deleted with the old bundle")
    if before.language_model is not None:
        del kept[before.language_model.file]
    with BundleWriter(folder, overwrite=True) as staging:
        for name in kept:
            staging.add(name, bundle.path / name)
        language_model = None
        if model is not None:
            if model.classes:
                names = ", ".join(model.classes)
                raise ValueError(f"classes: a bundle cannot contain the words of {names}: pass them with --lm")
            Fusion(model, bundle.vocabulary).check_words("the language model")
            write_compact(model.model.ngrams, staging.path / LANGUAGE_MODEL_FILE)
            language_model = BundledLanguageModel(file=LANGUAGE_MODEL_FILE, **model.weights)
        decoding = dataclasses.replace(before, language_model=language_model, **defaults)
        made = staging.seal(dataclasses.replace(bundle.manifest, decoding=decoding, files={}))
        for name, digest in kept.items():
            if made.manifest.files[name] != digest:
                raise IntegrityError(f"{bundle.path / name}: was replaced while it was being read: try again")
        return staging.finish(made.manifest)
