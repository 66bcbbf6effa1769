"""Options of decoding, validated at construction. What they mean is written in `decoding/` and `model/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.text.written.formatter import TextFormat
from u2moe.runtime.validation import checked_flag, checked_integer, checked_number

Search = Literal["attention_rescoring", "ctc_prefix_beam", "ctc_greedy", "attention"]
SEARCHES: tuple[Search, ...] = get_args(Search)

NONE: Literal["none"] = "none"
"""Says that nothing is used, not even what the bundle has."""
WITHOUT_BEAM: tuple[Search, ...] = ("ctc_greedy", "attention")
"""Searches that can use neither hotwords nor a language model."""
MOST_BEAMS = 1000
"""Largest beam: time is proportional to it, and more than a few dozen prefixes find nothing new."""

STREAM_CHUNK_SIZE = 16
"""Default encoder frames per chunk of a stream: 640 ms with encoder frames of 40 ms."""
LONGEST_PADDING_S = 10.0
SHORTEST_PAUSE_S = 0.4
"""Seconds: an utterance with less silence at its end may end within a word."""


@dataclass(frozen=True, kw_only=True)
class EndpointRule:
    """A rule fires when all its conditions hold; names are as in Kaldi and sherpa-onnx.

    Attributes:
        must_contain_nonsilence: whether the utterance must contain a frame that is not silence.
        min_trailing_silence: seconds of silence at the end.
        min_utterance_length: seconds since the utterance began, silence included.
    """

    must_contain_nonsilence: bool = False
    min_trailing_silence: float = 0.0
    min_utterance_length: float = 0.0

    def __post_init__(self) -> None:
        checked_flag("must_contain_nonsilence", self.must_contain_nonsilence)
        for name in ("min_trailing_silence", "min_utterance_length"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name), least=0, unit="seconds"))
        if self.min_trailing_silence == 0 == self.min_utterance_length:
            raise ValueError("an endpoint rule needs min_trailing_silence or min_utterance_length above 0")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An utterance ends when any rule fires. Defaults are as in sherpa-onnx; None disables a rule.

    Attributes:
        rule1: long silence without speech before it.
        rule2: shorter silence after speech.
        rule3: the utterance has become too long.
        pause: with full context, seconds of quiet audio at which a recording of more than 30 s is cut before encoding,
            so that each stretch of speech is encoded separately; at least 0.4, because words contain shorter pauses.
            Without rules nothing is cut.
    """

    rule1: EndpointRule | None = field(default_factory=lambda: EndpointRule(min_trailing_silence=2.4))
    rule2: EndpointRule | None = field(
        default_factory=lambda: EndpointRule(must_contain_nonsilence=True, min_trailing_silence=1.2)
    )
    rule3: EndpointRule | None = field(default_factory=lambda: EndpointRule(min_utterance_length=20.0))
    pause: float | None = 0.5

    def __post_init__(self) -> None:
        for name in ("rule1", "rule2", "rule3"):
            rule = getattr(self, name)
            if rule is not None and not isinstance(rule, EndpointRule):
                raise ValueError(f"{name} must be an EndpointRule or None, got {rule!r}")
        if self.pause is not None:
            object.__setattr__(
                self, "pause", checked_number("pause", self.pause, least=SHORTEST_PAUSE_S, unit="seconds")
            )

    @property
    def rules(self) -> tuple[tuple[int, EndpointRule], ...]:
        """The enabled rules with their numbers."""
        rules = enumerate((self.rule1, self.rule2, self.rule3), start=1)
        return tuple((number, rule) for number, rule in rules if rule is not None)

    @property
    def min_pause(self) -> float | None:
        """Seconds of quiet audio that end an utterance with full context; None: pauses do not end it."""
        return self.pause if self.rules else None


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How a recogniser decodes.

    `beam_size`, `ctc_weight`, `reverse_weight`, `padding_s` and `language_model`: None means the default of the bundle,
    which is that of the library unless another was chosen for it.

    Attributes:
        search: `attention_rescoring`: prefix beam search, then the decoder rescores its n-best list; `ctc_prefix_beam`
            and `ctc_greedy`: one pass; `attention`: beam search with only the decoder at the end of the utterance
            (partial results come from greedy search). None: rescoring if the model has a decoder, else prefix beam.
        beam_size: prefixes kept by a beam search, and maximum length of the n-best list; at most 1000.
        ctc_weight: weight of the first pass in rescoring.
        reverse_weight: weight of the right-to-left decoder in rescoring, 0 to 1.
        length_penalty: exponent of the length by which scores of `attention` are divided, -10 to 10.
        chunk_size: encoder frames per chunk. None: full context in `transcribe`; in a stream, the chunk size that the
            encoder was trained for, or 16 if it was trained for any.
        num_left_chunks: chunks of left context; -1: all. With unlimited left context a stream becomes slower and larger
            over time, so limit it if utterances may last for minutes, or let them end by `endpoint`.
        endpoint: rules by which an utterance ends and the next segment begins. None: a stream is one utterance, and
            `transcribe` uses the bundle's rules.
        language_model: language model for the prefix beam search and the second pass; "none": none, although the
            bundle has one. Searches that cannot use that of the bundle ignore it.
        padding_s: seconds of silence (zeros), 0 to 10, that the model hears before a source that begins in the middle
            of a sound, and after one that ends so; see `Padding`. Times are those of the source; endpoint rules
            count the silence.
        text_format: how English results are written: numbers as digits, sentences with small letters. None: as spoken.
    """

    search: Search | None = None
    beam_size: int | None = None
    ctc_weight: float | None = None
    reverse_weight: float | None = None
    length_penalty: float = 0.0
    chunk_size: int | None = None
    num_left_chunks: int = -1
    endpoint: EndpointConfig | None = None
    language_model: LanguageModelOptions | Literal["none"] | None = None
    padding_s: float | None = None
    text_format: TextFormat | None = None

    def __post_init__(self) -> None:
        if self.search is not None and self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}")
        if self.endpoint is not None and not isinstance(self.endpoint, EndpointConfig):
            raise ValueError(f"endpoint must be an EndpointConfig or None, got {self.endpoint!r}")
        self._check_language_model()
        if self.text_format is not None and not isinstance(self.text_format, TextFormat):
            raise ValueError(f"text_format must be a TextFormat or None, got {self.text_format!r}")
        checked: dict[str, float] = {
            "num_left_chunks": checked_integer("num_left_chunks", self.num_left_chunks, least=-1),
            "length_penalty": checked_number("length_penalty", self.length_penalty, least=-10, most=10),
        }
        if self.beam_size is not None:
            checked["beam_size"] = checked_integer("beam_size", self.beam_size, least=1, most=MOST_BEAMS)
        if self.ctc_weight is not None:
            checked["ctc_weight"] = checked_number("ctc_weight", self.ctc_weight, least=0, most=1e9)
        if self.reverse_weight is not None:
            checked["reverse_weight"] = checked_number("reverse_weight", self.reverse_weight, least=0, most=1)
        if self.padding_s is not None:
            checked["padding_s"] = checked_number(
                "padding_s", self.padding_s, least=0, most=LONGEST_PADDING_S, unit="seconds"
            )
        if self.chunk_size is not None:
            checked["chunk_size"] = checked_integer("chunk_size", self.chunk_size, least=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_language_model(self) -> None:
        if self.language_model in (None, NONE):
            return
        if not isinstance(self.language_model, LanguageModelOptions):
            raise ValueError(  # noqa: TRY004 - wrong options are all one error
                f"language_model must be LanguageModelOptions, 'none' or None, got {self.language_model!r}"
            )
        if self.search in WITHOUT_BEAM:
            raise ValueError(f"language_model needs a prefix beam search or rescoring, search is {self.search!r}")
