"""Decoding options, each declared once with `declarations.option`. `decoding/` and `model/` implement them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, Never, TypeVar, get_args

from u2moe.runtime.declarations import Checked, Definite, option, options_of
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.written.formatter import TextFormat

SearchMethod = Literal["attention_rescoring", "ctc_prefix_beam", "ctc_greedy", "attention"]
SEARCHES: tuple[SearchMethod, ...] = get_args(SearchMethod)

NONE: Literal["none"] = "none"  # Value that disables a feature, even if the bundle has a default for it
WITHOUT_BEAM: tuple[SearchMethod, ...] = ("ctc_greedy", "attention")
"""Searches that do not support hotwords, language models or grammars."""

STREAM_CHUNK_SIZE = 16  # Default number of encoder frames per chunk of a stream: 640 ms if an encoder frame is 40 ms
SHORTEST_PAUSE_S = 0.4  # Shortest allowed value of `pause` in seconds. Shorter silences occur within words

Open = TypeVar("Open")  # Type of an unset option that a bundle may set: None if it may be unset, otherwise `Never`

_LM_WEIGHT = {
    "name": "lm_weight", "kind": "number", "least": 0, "most": 2,
    "help": "weight of the server's language model, rounded to one decimal; 0 disables it",
}  # fmt: skip
_WRITTEN = {"name": "written", "kind": "flag", "help": "write English with digits and sentence case"}


@dataclass(frozen=True, kw_only=True)
class EndpointRule(Checked):
    """An endpoint rule. It fires when all its conditions are met. Its fields are named as in Kaldi and sherpa-onnx.

    Attributes:
        must_contain_nonsilence: whether the utterance must contain a frame that is not silence.
        min_trailing_silence: minimum silence at the end, in seconds.
        min_utterance_length: minimum length of the utterance in seconds, including silence.
    """

    must_contain_nonsilence: bool = option("flag", default=False)
    min_trailing_silence: float = option("number", 0.0, least=0, unit="seconds")
    min_utterance_length: float = option("number", 0.0, least=0, unit="seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_trailing_silence == 0 == self.min_utterance_length:
            raise ValueError("an endpoint rule needs min_trailing_silence or min_utterance_length above 0")


_RULES = (
    EndpointRule(min_trailing_silence=2.4),
    EndpointRule(must_contain_nonsilence=True, min_trailing_silence=1.2),
    EndpointRule(min_utterance_length=20.0),
)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(Checked):
    """Endpoint rules, by default those of sherpa-onnx. An utterance ends when any rule fires. None disables a rule.

    Attributes:
        rule1: long silence, even without speech.
        rule2: shorter silence after speech.
        rule3: maximum length of an utterance.
        pause: with full context, shortest pause in seconds at which a recording longer than 30 s is cut before
            encoding. At least 0.4, because words contain shorter pauses. Without rules, recordings are not cut.
        turn: threshold for the language model's probability of a sentence end. If the probability reaches it, rule 2's
            minimum silence is halved; otherwise, the silence is multiplied by 1.5. Ignored if the language model does
            not model sentence ends. None: the probability is not used.
    """

    rule1: EndpointRule | None = option("record", _RULES[0], record=EndpointRule, can_be_off=True)
    rule2: EndpointRule | None = option("record", _RULES[1], record=EndpointRule, can_be_off=True)
    rule3: EndpointRule | None = option("record", _RULES[2], record=EndpointRule, can_be_off=True)
    pause: float | None = option("number", 0.5, least=SHORTEST_PAUSE_S, unit="seconds", can_be_off=True)
    turn: float | None = option("number", above=0, most=1, can_be_off=True, lost="silence alone ends utterances")

    @property
    def rules(self) -> tuple[tuple[int, EndpointRule], ...]:
        """Enabled rules with their numbers."""
        rules = enumerate((self.rule1, self.rule2, self.rule3), start=1)
        return tuple((number, rule) for number, rule in rules if rule is not None)

    @property
    def min_pause(self) -> float | None:
        """With full context, seconds of quiet audio that end an utterance. None: pauses do not end utterances."""
        return self.pause if self.rules else None


@dataclass(frozen=True, kw_only=True)
class RescoringOptions(Checked, Generic[Open]):
    """Second-pass weights that the caller or the bundle chooses. `DecodingOptions` describes them."""

    ctc_weight: float | Open = option("number", 0.3, least=0, most=1e9, in_bundle=True, flag="--ctc-weight")
    reverse_weight: float | Open = option("number", 0.3, least=0, most=1, in_bundle=True, flag="--reverse-weight")


@dataclass(frozen=True, kw_only=True)
class RescoringWeights(Definite, RescoringOptions[Never]):
    """All weights of the second pass, as used by `attention_rescoring`.

    Attributes:
        ctc_weight: weight of the first-pass score.
        reverse_weight: weight of the right-to-left decoder, 0 to 1; ignored without that decoder.
        rescoring_weight: factor of the language model score.
    """

    rescoring_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BundledOptions(RescoringOptions[Open]):
    """Numeric options whose defaults a bundle may set."""

    beam_size: int | Open = option(
        "integer", 10, least=1, most=1000, in_bundle=True, flag="--beam-size", client={"most": 40}
    )
    padding_s: float | Open = option("number", 0.0, least=0, most=10, unit="seconds", in_bundle=True)
    blank_penalty: float | Open = option(
        "number", 0.0, least=0, most=10, in_bundle=True, flag="--blank-penalty", client={}
    )

    def weights(self: BundledOptions[Never], rescoring_weight: float = 1.0) -> RescoringWeights:
        """Return the weights of the second pass. `rescoring_weight` multiplies the language model score."""
        own = {name: getattr(self, name) for name in options_of(RescoringOptions)}
        return RescoringWeights(**own, rescoring_weight=rescoring_weight)


@dataclass(frozen=True, kw_only=True)
class AnyOptions(BundledOptions[Open]):
    """Base of `DecodingOptions` and `DefiniteOptions`."""

    search: SearchMethod | Open = option("choice", choices=SEARCHES, flag="--search")
    length_penalty: float = option("number", 0.0, least=-10, most=10, flag="--length-penalty")
    chunk_size: int | None = option("integer", least=1, flag="--chunk-size")
    num_left_chunks: int = option("integer", -1, least=-1, flag="--num-left-chunks")
    endpoint: EndpointConfig | None = option("record", record=EndpointConfig, in_bundle=True)
    language_model: LanguageModelOptions | Literal["none"] | Open = option(
        "record", record=LanguageModelOptions, choices=(NONE,), in_bundle=True, flag="--lm", client=_LM_WEIGHT
    )
    grammar: Grammar | None = option("record", record=Grammar, flag="--grammar", client={})
    text_format: TextFormat | None = option("record", record=TextFormat, flag="--format-text", client=_WRITTEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        has_model, has_grammar = self.language_model not in (None, NONE), self.grammar is not None
        if self.search in WITHOUT_BEAM and (has_model or has_grammar):
            name = "language_model" if has_model else "grammar"
            raise ValueError(f"{name} needs a prefix beam search or rescoring, but search is {self.search!r}")
        if has_model and has_grammar:
            raise ValueError("a grammar replaces the language model: pass only one of them")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(AnyOptions[None]):
    """Decoding options of a recogniser.

    For `beam_size`, `ctc_weight`, `reverse_weight`, `padding_s`, `blank_penalty` and `language_model`, None means the
    bundle's default. If the bundle has no default, the library's default applies.

    Attributes:
        search: search algorithm: `attention_rescoring` (prefix beam search, then the decoder rescores the n-best list),
            `ctc_prefix_beam` or `ctc_greedy` (first pass only), or `attention` (beam search with only the decoder, at
            the end of the utterance; partial results come from greedy search). None: `attention_rescoring` if the model
            has a decoder, otherwise `ctc_prefix_beam`.
        beam_size: prefixes kept by a beam search, and maximum length of the n-best list.
        ctc_weight: weight of the first pass in rescoring.
        reverse_weight: weight of the right-to-left decoder in rescoring.
        length_penalty: the `attention` search divides scores by the length raised to this power.
        chunk_size: encoder frames per chunk. None: full context in `transcribe`; in a stream, the chunk size that the
            encoder was trained for, or 16 if it was trained for any size.
        num_left_chunks: chunks of left context; -1: all. With unlimited left context, a stream slows down and uses more
            memory over time. If utterances may last for minutes, limit the left context or set `endpoint`.
        endpoint: rules that end an utterance and start the next segment. None: a stream is one utterance, and
            `transcribe` uses the bundle's rules.
        language_model: language model for the prefix beam search and the second pass; "none" disables the bundle's.
            Searches that do not support language models ignore the bundle's.
        padding_s: seconds of silence (zeros) added before a source that begins mid-sound, and after one that ends
            mid-sound; see `Padding`. Times refer to the source. Endpoint rules count the silence.
        blank_penalty: subtracted from the blank's score before the softmax of the first pass, for fewer deletions and
            more insertions. Endpoint rules ignore it.
        grammar: phrases that may be said; replaces hotwords and the language model. None: anything.
        text_format: written form of results, with numbers as digits and English in sentence case. None: as spoken.
    """


@dataclass(frozen=True, kw_only=True)
class DefiniteOptions(Definite, AnyOptions[Never]):
    """Decoding options in which every default is filled in. If `chunk_size` is None, full context is used."""

    @classmethod
    def of(cls, options: DecodingOptions, defaults: BundledOptions[Never], **chosen: Any) -> DefiniteOptions:
        """Return `options` with the values in `chosen`. Options that are still None get their value from `defaults`."""
        given = {name: value for name, value in vars(options).items() if value is not None}
        return cls(**{**{name: getattr(defaults, name) for name in options_of(BundledOptions)}, **given, **chosen})


BUNDLED = {name: options_of(DecodingOptions)[name] for name in options_of(BundledOptions)}
"""Numeric options whose defaults a bundle may set, with their descriptions in `DecodingOptions`."""
