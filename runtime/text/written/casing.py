"""Capital letters for text from a vocabulary in capitals: at the beginning of sentences, and in words of a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "April", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
"""Without March and May, which are more often something else; in a date they are known by the day after."""
_OTHERS = (
    "I", "I'm", "I've", "I'll", "I'd", "Christmas", "Easter", "English", "American", "British", "French", "German",
    "Spanish", "Chinese", "Japanese", "America", "Europe", "Africa", "Asia", "England", "Britain", "France", "Germany",
    "Spain", "China", "Japan", "India", "London", "Paris", "New York", "United States", "Internet", "OK", "TV", "PC",
    "Mr", "Mrs", "Ms", "Dr",
)  # fmt: skip
COMMON = (*_DAYS, *_MONTHS, *_OTHERS)
"""Words that always have capitals."""


class Casing:
    """The letter case of words.

    Args:
        phrases: words, or phrases of several words, as they are written: "Kowalski", "McDonald", "New York".
    """

    def __init__(self, phrases: Iterable[str] = ()) -> None:
        self._phrases: dict[str, list[tuple[str, ...]]] = {}
        for phrase in (*COMMON, *phrases):
            words = tuple(phrase.split())
            if words:
                self._phrases.setdefault(words[0].lower(), []).append(words)
        for listed in self._phrases.values():
            listed.sort(key=len)

    def of(self, words: Sequence[str]) -> list[str]:
        """Words in small letters with the capitals of a sentence."""
        cased: list[str] = []
        small = [word.lower() for word in words]
        while len(cased) < len(words):
            place = len(cased)
            for phrase in reversed(self._phrases.get(_bare(small[place]), [])):  # the longest, and of these the last
                following = small[place : place + len(phrase)]
                if [word.lower() for word in phrase] == [*following[:-1], _bare(following[-1])]:
                    cased += [*phrase[:-1], phrase[-1] + words[place + len(phrase) - 1][len(phrase[-1]) :]]
                    break
            else:
                cased.append(words[place])
        if cased:
            cased[0] = cased[0][:1].upper() + cased[0][1:]
        return cased


def _bare(word: str) -> str:
    """A word without the possessive."""
    return word.removesuffix("'s")
