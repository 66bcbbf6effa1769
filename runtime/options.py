"""Options of decoding, each declared once (`declarations`). What they mean is written in `decoding/` and `model/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, Never, TypeVar, get_args

from u2moe.runtime.declarations import check_options, option, options_of, take_defaults
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.written.formatter import TextFormat

SearchMethod = Literal["attention_rescoring", "ctc_prefix_beam", "ctc_greedy", "attention"]
SEARCHES: tuple[SearchMethod, ...] = get_args(SearchMethod)

NONE: Literal["none"] = "none"
"""Says that nothing is used, not even what the bundle has."""
WITHOUT_BEAM: tuple[SearchMethod, ...] = ("ctc_greedy", "attention")
"""Searches that can use neither hotwords, nor a language model, nor a grammar."""

STREAM_CHUNK_SIZE = 16
"""Default encoder frames per chunk of a stream: 640 ms with encoder frames of 40 ms."""
SHORTEST_PAUSE_S = 0.4
"""Seconds: an utterance with less silence at its end may end within a word."""

Open = TypeVar("Open")
"""What stands for an option that is left to the bundle: None, or nothing (`Never`) where all are definite."""

_LM_WEIGHT = {
    "name": "lm_weight", "kind": "number", "least": 0, "most": 2,
    "help": "weight of the server's language model, rounded to one decimal; 0: none",
}  # fmt: skip
_WRITTEN = {"name": "written", "kind": "flag", "help": "whether English has digits and small letters"}


@dataclass(frozen=True, kw_only=True)
class EndpointRule:
    """A rule fires when all its conditions hold; names are as in Kaldi and sherpa-onnx.

    Attributes:
        must_contain_nonsilence: whether the utterance must contain a frame that is not silence.
        min_trailing_silence: seconds of silence at the end.
        min_utterance_length: seconds since the utterance began, silence included.
    """

    must_contain_nonsilence: bool = option("flag", default=False)
    min_trailing_silence: float = option("number", 0.0, least=0, unit="seconds")
    min_utterance_length: float = option("number", 0.0, least=0, unit="seconds")

    def __post_init__(self) -> None:
        check_options(self)
        if self.min_trailing_silence == 0 == self.min_utterance_length:
            raise ValueError("an endpoint rule needs min_trailing_silence or min_utterance_length above 0")


_RULES = (
    EndpointRule(min_trailing_silence=2.4),
    EndpointRule(must_contain_nonsilence=True, min_trailing_silence=1.2),
    EndpointRule(min_utterance_length=20.0),
)


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
        turn: the language model's probability of the end of a sentence from which rule 2 needs half of its silence;
            below it, it needs half as much again. Without a model that knows sentences, rule 2 stays as it is. None:
            silence alone decides.
    """

    rule1: EndpointRule | None = option("record", _RULES[0], record=EndpointRule, can_be_off=True)
    rule2: EndpointRule | None = option("record", _RULES[1], record=EndpointRule, can_be_off=True)
    rule3: EndpointRule | None = option("record", _RULES[2], record=EndpointRule, can_be_off=True)
    pause: float | None = option("number", 0.5, least=SHORTEST_PAUSE_S, unit="seconds", can_be_off=True)
    turn: float | None = option("number", above=0, most=1, can_be_off=True, lost="silence alone ends utterances")

    def __post_init__(self) -> None:
        check_options(self)

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
class RescoringOptions(Generic[Open]):
    """The weights of the second pass that a caller or a bundle chooses; `DecodingOptions` says what they mean."""

    ctc_weight: float | Open = option(
        "number", 0.3, least=0, most=1e9, in_bundle=True, flag="--ctc-weight", metavar="X"
    )
    reverse_weight: float | Open = option(
        "number", 0.3, least=0, most=1, in_bundle=True, flag="--reverse-weight", metavar="X"
    )


@dataclass(frozen=True, kw_only=True)
class RescoringWeights(RescoringOptions[Never]):
    """All weights of the second pass, as `attention_rescoring` takes them.

    Attributes:
        ctc_weight: weight of the first-pass score.
        reverse_weight: weight of the right-to-left decoder, 0 to 1; ignored without that decoder.
        rescoring_weight: factor for the score of the language model.
    """

    rescoring_weight: float = 1.0

    def __post_init__(self) -> None:
        take_defaults(self)
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class BundledOptions(RescoringOptions[Open]):
    """The options that are numbers and of which a bundle may choose the default."""

    beam_size: int | Open = option(
        "integer", 10, least=1, most=1000, in_bundle=True, flag="--beam-size", metavar="N", client={"most": 40}
    )
    padding_s: float | Open = option("number", 0.0, least=0, most=10, unit="seconds", in_bundle=True)
    blank_penalty: float | Open = option(
        "number", 0.0, least=0, most=10, in_bundle=True, flag="--blank-penalty", metavar="X", client={}
    )

    def weights(self: BundledOptions[Never], rescoring_weight: float = 1.0) -> RescoringWeights:
        """The weights of the second pass, with that of the language model if there is one."""
        own = {name: getattr(self, name) for name in options_of(RescoringOptions)}
        return RescoringWeights(**own, rescoring_weight=rescoring_weight)


@dataclass(frozen=True, kw_only=True)
class AnyOptions(BundledOptions[Open]):
    """All options of decoding: `DecodingOptions` or `DefiniteOptions`."""

    search: SearchMethod | Open = option("choice", choices=SEARCHES, flag="--search")
    length_penalty: float = option("number", 0.0, least=-10, most=10, flag="--length-penalty", metavar="X")
    chunk_size: int | None = option("integer", least=1, flag="--chunk-size", metavar="N")
    num_left_chunks: int = option("integer", -1, least=-1, flag="--num-left-chunks", metavar="N")
    endpoint: EndpointConfig | None = option("record", record=EndpointConfig, in_bundle=True)
    language_model: LanguageModelOptions | Literal["none"] | Open = option(
        "record", record=LanguageModelOptions, choices=(NONE,), in_bundle=True, flag="--lm", client=_LM_WEIGHT
    )
    grammar: Grammar | None = option("record", record=Grammar, flag="--grammar", client={})
    text_format: TextFormat | None = option("record", record=TextFormat, flag="--format-text", client=_WRITTEN)

    def __post_init__(self) -> None:
        check_options(self)
        if self.language_model not in (None, NONE) and self.search in WITHOUT_BEAM:
            raise ValueError(f"language_model needs a prefix beam search or rescoring, search is {self.search!r}")
        if self.grammar is not None:
            if self.search in WITHOUT_BEAM:
                raise ValueError(f"grammar needs a prefix beam search or rescoring, search is {self.search!r}")
            if self.language_model not in (None, NONE):
                raise ValueError("a grammar takes the place of a language model: expected one of both")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(AnyOptions[None]):
    """How a recogniser decodes.

    `beam_size`, `ctc_weight`, `reverse_weight`, `padding_s`, `blank_penalty` and `language_model`: None means the
    default of the bundle, which is that of the library unless another was chosen for it.

    Attributes:
        search: `attention_rescoring`: prefix beam search, then the decoder rescores its n-best list; `ctc_prefix_beam`
            and `ctc_greedy`: one pass; `attention`: beam search with only the decoder at the end of the utterance
            (partial results come from greedy search). None: rescoring if the model has a decoder, else prefix beam.
        beam_size: prefixes kept by a beam search, and maximum length of the n-best list.
        ctc_weight: weight of the first pass in rescoring.
        reverse_weight: weight of the right-to-left decoder in rescoring.
        length_penalty: exponent of the length by which scores of `attention` are divided.
        chunk_size: encoder frames per chunk. None: full context in `transcribe`; in a stream, the chunk size that the
            encoder was trained for, or 16 if it was trained for any.
        num_left_chunks: chunks of left context; -1: all. With unlimited left context a stream becomes slower and larger
            over time, so limit it if utterances may last for minutes, or let them end by `endpoint`.
        endpoint: rules by which an utterance ends and the next segment begins. None: a stream is one utterance, and
            `transcribe` uses the bundle's rules.
        language_model: language model for the prefix beam search and the second pass; "none": none, although the
            bundle has one. Searches that cannot use that of the bundle ignore it.
        padding_s: seconds of silence (zeros) that the model hears before a source that begins in the middle
            of a sound, and after one that ends so; see `Padding`. Times are those of the source; endpoint rules
            count the silence.
        blank_penalty: taken from the score of the blank before the softmax, in the first pass, so that fewer words are
            left out and more are inserted. Endpoint rules hear silence without it.
        grammar: what may be said, in place of hotwords and a language model. None: anything.
        text_format: how results are written: numbers as digits, English sentences with small letters. None: as spoken.
    """


@dataclass(frozen=True, kw_only=True)
class DefiniteOptions(AnyOptions[Never]):
    """Options of decoding with nothing left to the bundle; `chunk_size` None means full context."""

    def __post_init__(self) -> None:
        take_defaults(self)
        super().__post_init__()

    @classmethod
    def of(cls, options: DecodingOptions, defaults: BundledOptions[Never], **chosen: Any) -> DefiniteOptions:
        """Options with defaults for what they leave open, and with what the caller has chosen."""
        given = {name: value for name, value in vars(options).items() if value is not None}
        return cls(**{**{name: getattr(defaults, name) for name in options_of(BundledOptions)}, **given, **chosen})


BUNDLED = {name: options_of(DecodingOptions)[name] for name in options_of(BundledOptions)}
"""The numbers of which a bundle may choose the default, as `DecodingOptions` describes them."""
