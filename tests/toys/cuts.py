"""Checks that cutting a long recording loses and duplicates nothing, by recognising each utterance unstreamed. Each
utterance is encoded and decoded again from its samples in the recording. If the stream had dropped, repeated or moved
frames, or mixed up utterances, the words would differ."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile

from u2moe.runtime import Recognizer
from u2moe.runtime.decoding.ctc import ctc_prefix_beam_search
from u2moe.runtime.decoding.pipeline import Concluded, Observer
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.model.features import fbank


@dataclass(frozen=True, kw_only=True)
class LoggedUtterance:
    """An utterance that a recogniser has concluded.

    Attributes:
        window_start: feature frame at which the last window began; `window_len`: its number of feature frames.
        start: its first encoder frame; `num_frames`: number of encoder frames.
        text: recognised text; `times`: seconds at which its tokens peak, from the recording's first sample.
    """

    window_start: int
    window_len: int
    start: int
    num_frames: int
    text: str
    times: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """The cuts of a recording.

    Attributes:
        num_utterances: number of utterances, including those without words.
        num_lost: encoder frames in no utterance; `num_doubled`: in two.
        num_different: utterances whose text or times differ when recognised unstreamed; None if not checked.
    """

    num_utterances: int
    num_lost: int
    num_doubled: int
    num_different: int | None = None


def logged(recognizer: Recognizer) -> tuple[Recognizer, list[LoggedUtterance]]:
    """Return the same recogniser without padding, with a list to which it appends every utterance that it concludes."""
    rate = recognizer.model.config.subsampling_rate
    log: list[LoggedUtterance] = []

    def concluded(utterance: Concluded) -> None:
        if utterance.num_frames:
            log.append(
                LoggedUtterance(
                    window_start=utterance.window_start * rate, window_len=utterance.window_len, start=utterance.start,
                    num_frames=utterance.num_frames, text=utterance.result.text, times=tuple(utterance.result.times),
                )
            )  # fmt: skip

    observer = Observer(concluded=concluded)
    options = replace(recognizer.options, padding_s=0.0)
    return Recognizer(recognizer.bundle, recognizer.model, options, observer=observer), log


def cuts_of(
    recognizer: Recognizer, utterances: Sequence[LoggedUtterance], num_samples: int, file: Path | None = None
) -> Cuts:
    """Check the cuts of a recording.

    Args:
        recognizer: the recogniser.
        utterances: its utterances in order.
        num_samples: samples of the recording at the model's rate.
        file: the recording at that rate, to recognise utterances again; only possible with full context.
    """
    config = recognizer.model.config
    features = _num_features(recognizer, num_samples)
    position = num_lost = num_doubled = 0
    for utterance in utterances:
        num_lost += max(utterance.start - position, 0)
        num_doubled += max(position - utterance.start, 0)
        position = utterance.start + utterance.num_frames
    num_lost += max((features - config.window) // config.subsampling_rate + 1 - position, 0)
    different = None
    if file is not None:
        different = sum(_recognized_alone(recognizer, utterance, file) != utterance for utterance in utterances)
    return Cuts(num_utterances=len(utterances), num_lost=num_lost, num_doubled=num_doubled, num_different=different)


def _num_features(recognizer: Recognizer, num_samples: int) -> int:
    length, shift = _frame_samples(recognizer)
    return max((num_samples - length) // shift + 1, 0)


def _frame_samples(recognizer: Recognizer) -> tuple[int, int]:
    """Return the samples in a feature frame, and from one frame to the next."""
    config = recognizer.bundle.manifest.features
    per_ms = config.sample_rate / 1000
    return round(config.frame_length_ms * per_ms), round(config.frame_shift_ms * per_ms)


def _recognized_alone(recognizer: Recognizer, utterance: LoggedUtterance, file: Path) -> LoggedUtterance:
    """Return an utterance recognised from only its samples: features, encoder, search and rescoring."""
    length, shift = _frame_samples(recognizer)
    model, manifest = recognizer.model, recognizer.bundle.manifest
    with soundfile.SoundFile(file) as source:
        source.seek(utterance.window_start * shift)
        samples = source.read((utterance.window_len - 1) * shift + length, dtype="float32")
    begin = utterance.start - utterance.window_start // model.config.subsampling_rate
    output = model.encode(fbank(samples, manifest.features))[begin : begin + utterance.num_frames]
    if not len(output):
        return replace(utterance, text="", times=())  # the utterance is not in its window
    hypotheses = ctc_prefix_beam_search(model.ctc(output), recognizer.options.beam_size, model.config.blank)
    if model.has_decoder:
        scores = model.token_scores(output, [hypothesis.tokens for hypothesis in hypotheses])
        ranked = attention_rescoring(hypotheses, scores, manifest.decoding.weights())
        hypotheses = [item.hypothesis for item in ranked]
    best, frame_s = hypotheses[0], manifest.frame_s
    times = tuple(round((utterance.start + time) * frame_s, 3) for time in best.times)
    return replace(utterance, text=recognizer.vocabulary.text(best.tokens), times=times)
