"""Language models, and options for their use in the search."""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from u2moe.runtime.declarations import Checked, option, options_of
from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.language.files import MAGIC, parse_compact, read_arpa
from u2moe.runtime.language.ngrams import Ngrams
from u2moe.runtime.text.vocabulary import WORD_BOUNDARY, is_special
from u2moe.runtime.validation import wrong

Level = Literal["word", "token"]


class LanguageModel:
    """An n-gram model of words or tokens. It is immutable, so recognisers may share it.

    Attributes:
        ngrams: the n-grams and their probabilities.
        fingerprint: SHA-256 of the file.
    """

    def __init__(self, ngrams: Ngrams, fingerprint: str = "") -> None:
        self.ngrams = ngrams
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, file: str | os.PathLike[str]) -> Self:
        """Read an ARPA file (plain or .gz), or a compact file as written by `u2moe lm build`, into memory.

        Raises:
            LanguageModelError: the file cannot be read, or is damaged.
        """
        path = Path(file)
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            raise LanguageModelError(f"{path}: cannot be read as a language model: {error}") from error
        if content.startswith(MAGIC[:-1]):  # in any version
            return cls.parse(content, str(path))
        return cls(read_arpa(path), hashlib.sha256(content).hexdigest())

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Parse the content of a compact file. `source` names the file in errors.

        Raises:
            LanguageModelError: the file is not compact, has another version, or is damaged.
        """
        return cls(parse_compact(content, source), hashlib.sha256(content).hexdigest())

    @property
    def level(self) -> Level:
        """Unit of the model: "token" if any of its words contains U+2581, else "word"."""
        return "token" if any(WORD_BOUNDARY in word for word in self.ngrams.words) else "word"

    def capitalized(self) -> tuple[str, ...]:
        """Return the words whose capitalised form is more probable than their lower-case form.

        Unigram probabilities of a Kneser-Ney model depend on the number of distinct preceding words, so capitals at the
        beginning of sentences have little weight.
        """
        log_probs = self.ngrams.log_prob[1 : 1 + len(self.ngrams.words)].tolist()
        best: dict[str, tuple[float, str]] = {}
        for word, log_prob in zip(self.ngrams.words, log_probs, strict=True):
            if not is_special(word):
                best[word.lower()] = max(best.get(word.lower(), (-math.inf, "")), (log_prob, word))
        least = min(log_probs)
        return tuple(word for lower, (log_prob, word) in best.items() if word != lower and log_prob > least)

    def __deepcopy__(self, _memo: object) -> Self:
        return self


class ModelOrFile:
    """Descriptor of a dataclass field that accepts a model or the path of its file, and stores the model."""

    def __get__(self, options: object, _owner: type) -> LanguageModel:
        if options is None:
            raise AttributeError("model")  # tells dataclasses that the field has no default
        model: LanguageModel = options.__dict__["model"]
        return model

    def __set__(self, options: object, value: LanguageModel | str | os.PathLike[str]) -> None:
        if isinstance(value, str | os.PathLike):
            value = LanguageModel.open(value)
        elif not isinstance(value, LanguageModel):
            raise wrong("model", "a LanguageModel or the path of a file", value)
        options.__dict__["model"] = value


@dataclass(frozen=True, kw_only=True, eq=False)
class FusionWeights(Checked):
    """Weights of a language model in the search; see `LanguageModelOptions`."""

    weight: float = option("number", 0.5, least=0, most=100)
    word_bonus: float = option("number", 0.5, least=-100, most=100)
    unknown_score: float = option("number", -5.0, least=-1000, most=0)
    rescoring_weight: float = option("number", 1.0, least=0, most=100)
    level: Level | None = option("choice", choices=get_args(Level))

    @property
    def weights(self) -> dict[str, Any]:
        """The weights by name."""
        return {name: getattr(self, name) for name in options_of(FusionWeights)}


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelOptions(FusionWeights):
    """Options for shallow fusion of a language model.

    The search adds two terms to the score of a hypothesis: its log-probability in the language model (natural
    logarithm) times `weight`, and `word_bonus` per word. For a model of tokens, the bonus is per token.

    Attributes:
        model: the model, or the file to read it from.
        weight: weight of the model's log-probabilities relative to those of the CTC head, 0 to 100.
        word_bonus: bonus per word, -100 to 100. It compensates for the preference of language models for short texts.
        unknown_score: added to the log-probability of out-of-vocabulary words, before weighting, -1000 to 0.
        rescoring_weight: factor applied to the model's score in the second pass, 0 to 100.
        level: unit of the model. None: "token" if any word of the model contains U+2581, otherwise "word".
        classes: words by class: `{"<name>": ["Kowalski", "Nguyen"]}`. The class name is a word of the model. The words
            of the class share the probability of this name equally. Phrases are split into words.
    """

    model: ModelOrFile = ModelOrFile()
    classes: Mapping[str, Iterable[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        classes: Any = self.classes
        if not isinstance(classes, Mapping):
            raise wrong("classes", "a mapping from words of the model to lists of words", classes)
        checked: dict[str, tuple[str, ...]] = {}  # the distinct words of each class, in the given order
        for name, phrases in classes.items():
            if name not in self.model.ngrams.words:
                raise ValueError(f"classes: the language model has no word {name!r}")
            if isinstance(phrases, str | bytes) or not isinstance(phrases, Iterable):
                raise ValueError(f"classes: {name!r} needs a list of words, got {phrases!r}")  # noqa: TRY004
            listed = list(phrases)
            if not all(isinstance(phrase, str) for phrase in listed):
                raise ValueError(f"classes: {name!r} has an entry that is not text")
            words = tuple(dict.fromkeys(word for phrase in listed for word in phrase.split()))
            if not words:
                raise ValueError(f"classes: {name!r} is empty")
            checked[name] = words
        object.__setattr__(self, "classes", checked)

    @property
    def digest(self) -> dict[str, Any]:
        """Everything that affects results, as JSON."""
        classes = {name: list(words) for name, words in self.classes.items()}
        return {"model": self.model.fingerprint, **self.weights, "classes": classes}
