"""Formats results for reading: numbers as digits and, in English, sentence case. Scores and times are kept."""

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.result import Alternative, Result, Transcript, WordResult
from u2moe.runtime.text.vocabulary import Vocabulary, join_texts, stands_alone
from u2moe.runtime.text.written.english import MONTHS, VERBS, Written, num_settled, write
from u2moe.runtime.validation import checked_options, wrong

LANGUAGES = ("en", "zh", "ja")
COMMON = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
    *(month.capitalize() for month in MONTHS if month not in VERBS),  # in a date, the day shows what those mean
    "I", "I'm", "I've", "I'll", "I'd", "Christmas", "Easter", "English", "American", "British", "French", "German",
    "Spanish", "Chinese", "Japanese", "America", "Europe", "Africa", "Asia", "England", "Britain", "France", "Germany",
    "Spain", "China", "Japan", "India", "London", "Paris", "New York", "United States", "Internet", "OK", "TV", "PC",
    "Mr", "Mrs", "Ms", "Dr",
)  # fmt: skip
"""Words that always have capitals."""
_AS_SPOKEN = {
    "zh": ("十分", "十有八九", "一千零一夜", "十一长假", "三百六十行"),
    "ja": ("十分", "八百屋", "七五三", "百人一首", "千葉", "百合"),
}
"""Words and names in which the grammars mistake numerals for numbers. 十分 ("very") also means ten minutes; as part
of a time it is converted."""
_QUARTER = re.compile("点[一三]刻")


@dataclass(frozen=True, kw_only=True)
class TextFormat(Checked):
    """How to write results.

    Attributes:
        language: language of the text. "zh" and "ja" need the extra `written`; in these languages, only numbers
            are changed.
        numbers: whether to write numbers, times, dates and money with digits.
        casing: whether to change text in capitals to sentence case. Words in `COMMON` and `capitalized` are written
            as listed.
        capitalized: words and phrases to capitalize besides those in `COMMON`, as they should be written.
    """

    language: str = option("choice", "en", choices=LANGUAGES)
    numbers: bool = option("flag", default=True)
    casing: bool = option("flag", default=True)
    capitalized: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        words: Any = self.capitalized
        if isinstance(words, str) or not isinstance(words, Iterable):
            raise wrong("capitalized", "a list of words", words)
        listed = tuple(words)
        if not all(isinstance(word, str) for word in listed):
            raise ValueError("capitalized must be a list of words, got an item that is not text")
        object.__setattr__(self, "capitalized", listed)


class TextFormatter:
    """Formats texts and results as its `TextFormat` specifies.

    Raises:
        ModuleNotFoundError: the language needs a package that is not installed.
    """

    def __init__(self, text_format: TextFormat | None = None) -> None:
        self.format = checked_options("text_format", text_format, TextFormat())
        self._casing = Casing(self.format.capitalized)
        has_grammars = self.format.language != "en" and self.format.numbers
        self._replaced = Grammars(self.format.language).replaced if has_grammars else lambda _: []

    def text(self, text: str) -> str:
        """Format a text."""
        if self.format.language != "en":
            for part in reversed(self._replaced(text)):
                text = text[: part.begin] + part.text + text[part.end :]
            return text
        spoken = text.split()
        return " ".join(part.text for part in self._written(spoken)) if _is_english(spoken) else text

    def result(self, result: Result, vocabulary: Vocabulary | None = None) -> Result:
        """Format the texts and words of a result.

        A written word has the times and the lowest confidence of the spoken words that it replaces. Tokens, their
        times, and scores are unchanged. Words stay committed if no later words can change how they are written.

        Args:
            result: the result.
            vocabulary: the model's vocabulary, used only if the result is partial. None: assume a single letter case
                and only scripts with spaces.
        """
        nbest: dict[str, Alternative] = {}
        for alternative in result.nbest:
            own = self.text(alternative.text)
            nbest.setdefault(own, dataclasses.replace(alternative, text=own))
        result = dataclasses.replace(result, nbest=list(nbest.values()))
        words, spoken = result.words, result.text.split()
        if self.format.language != "en":
            covered = _covered(self._replaced(result.text), result.text, [word.word for word in words])
            words, text = [_joined(part, words) for part in covered], self.text(result.text)
            # Nothing is committed, because later words may continue a number.
            committed, num = (text, len(words)) if result.is_final else ("", 0)
        elif _is_english(spoken):
            written = self._written(spoken)
            text = " ".join(part.text for part in written)
            if " ".join(spoken) == result.text and spoken == [word.word for word in words]:
                words = [_joined(part, words) for part in written]
            num = len(written) if result.is_final else self._num_settled(result.committed.split(), vocabulary)
            committed = " ".join(part.text for part in written[:num])
        else:
            return result
        return dataclasses.replace(result, text=text, words=words, committed=committed, num_committed=num)

    def transcript(self, transcript: Transcript) -> Transcript:
        """Format the segments of a transcript."""
        segments = [self.result(segment) for segment in transcript.segments]
        text = join_texts([segment.text for segment in segments if segment.text])
        return dataclasses.replace(transcript, text=text, segments=segments)

    def _num_settled(self, spoken: Sequence[str], vocabulary: Vocabulary | None) -> int:
        """Return how many written words come from committed words and cannot be changed by later words."""
        is_capital = self.format.casing and all(word == word.upper() for word in spoken)
        if vocabulary and (vocabulary.has_spaceless or (vocabulary.convert_case is str and is_capital)):
            return 0  # another script, or another letter case, may still follow
        plain = [word.lower() for word in spoken]
        if self.format.numbers:
            plain = [part.text for part in write(plain[: num_settled(plain)])]
        return self._casing.num_settled(plain)

    def _written(self, spoken: Sequence[str]) -> list[Written]:
        plain = [word.lower() for word in spoken]
        written = write(plain) if self.format.numbers else [Written(w, i, i + 1) for i, w in enumerate(plain)]
        if not (self.format.casing and all(word == word.upper() for word in spoken)):
            unchanged = {Written(word.lower(), place, place + 1): word for place, word in enumerate(spoken)}
            return [part._replace(text=unchanged.get(part, part.text)) for part in written]
        texts = self._casing.of([part.text for part in written])
        for place, text in enumerate(texts):  # in a date, March and May are also months
            is_before_day = texts[place + 1 : place + 2] and texts[place + 1][0].isdigit()
            is_after_day = place >= 2 and texts[place - 1] == "of" and texts[place - 2][0].isdigit()
            if text in MONTHS and (is_before_day or is_after_day):
                texts[place] = text.capitalize()
        return [part._replace(text=text) for part, text in zip(written, texts, strict=True)]


formatter_of = lru_cache(maxsize=16)(TextFormatter)
"""Formatter for a text format. Streams with the same format share one."""


def _covered(parts: Sequence[Written], text: str, spoken: Sequence[str]) -> Iterator[Written]:
    """Yield the written words of a text, given the parts that change and the spoken words."""
    position, places = 0, []
    for word in spoken:
        places.append(text.find(word, position))
        position = places[-1] + len(word)
    begin = 0
    while begin < len(spoken):
        part = next((part for part in parts if part.begin <= places[begin] < part.end), None)
        end = begin + 1 if part is None else bisect_left(places, part.end)
        yield Written(spoken[begin] if part is None else part.text.strip(), begin, end)
        begin = end


def _joined(part: Written, words: Sequence[WordResult]) -> WordResult:
    """Return a written word with the start, end and lowest confidence of its spoken words."""
    own = words[part.begin : part.end]
    confidences = [word.confidence for word in own if word.confidence is not None]
    return WordResult(word=part.text, start=own[0].start, end=own[-1].end, confidence=min(confidences, default=None))


def _is_english(words: Sequence[str]) -> bool:
    """Return whether no word contains a character of a script without spaces."""
    return not any(stands_alone(character) for word in words for character in word)


class Casing:
    """Capitalizes words as in a sentence, and `phrases` as they are listed: "Kowalski", "McDonald", "New York"."""

    def __init__(self, phrases: Iterable[str] = ()) -> None:
        self._phrases: dict[str, list[list[str]]] = {}
        for words in sorted(filter(None, map(str.split, (*COMMON, *phrases))), key=len):
            self._phrases.setdefault(words[0].lower(), []).append(words)

    def of(self, words: Sequence[str]) -> list[str]:
        """Capitalize lower-case words as in a sentence."""
        cased: list[str] = []
        small = [word.lower() for word in words]
        while len(cased) < len(words):
            place = len(cased)
            # Longest first, then the last listed. A phrase may end with a possessive "'s".
            for phrase in reversed(self._phrases.get(small[place].removesuffix("'s"), [])):
                following = small[place : place + len(phrase)]
                if [word.lower() for word in phrase] == [*following[:-1], following[-1].removesuffix("'s")]:
                    cased += [*phrase[:-1], phrase[-1] + words[place + len(phrase) - 1][len(phrase[-1]) :]]
                    break
            else:
                cased.append(words[place])
        if cased:
            cased[0] = cased[0][:1].upper() + cased[0][1:]
        return cased

    def num_settled(self, words: Sequence[str]) -> int:
        """Return how many words keep their case whatever follows: all except last ones that may begin a phrase."""
        small = [word.lower() for word in words]
        for place, word in enumerate(small):
            longer = (phrase for phrase in self._phrases.get(word, []) if len(phrase) > len(words) - place)
            if any([each.lower() for each in phrase[: len(words) - place]] == small[place:] for phrase in longer):
                return place
        return len(words)


class Grammars:
    """Finds the parts of a text in "zh" or "ja" that wetext's grammars (extra `written`) write with digits.

    Single numerals (as in 千葉), approximate numbers (五六个人), quarter hours, and some words and names stay as
    spoken. The standard GB/T 15835 requires characters for approximate numbers. Quarter hours stay because the grammars
    mistake them for decimals. Raises ModuleNotFoundError if wetext is not installed.
    """

    def __init__(self, language: str) -> None:
        from wetext import Normalizer  # noqa: PLC0415 - an extra

        self._normalizer = Normalizer(lang=language, operator="itn")
        self._as_spoken = re.compile("|".join(_AS_SPOKEN[language]))

    def replaced(self, text: str) -> list[Written]:
        """Return the parts of a text that change, in order."""
        kept = [found.span() for found in self._as_spoken.finditer(text)]
        parts: list[Written] = []
        for each in self._normalizer.normalize_with_mapping(text).mappings:
            start, end, spoken, written = each.input_start, each.input_end, each.input_text, each.output_text
            if each.token_type == "time":  # noqa: S105 - the mapping pads times with zeros
                written = self._normalizer.normalize(spoken)
            is_number = end - start > 1 and "~" not in written and not _QUARTER.search(spoken)
            if is_number and not any(first <= start and end <= last for first, last in kept):
                is_next = parts and parts[-1].end == start and parts[-1].text[-1].isalnum()  # a time after a date
                parts.append(Written(f" {written}" if is_next else written, start, end))
        return parts
