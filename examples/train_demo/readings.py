"""Possible readings of written text, and word errors of the best one. Recognisers write numbers in different ways."""

import re
from collections.abc import Callable

from u2moe.runtime.text.word_errors import edit_distance, words

_UNITS = (
    *("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN", "ELEVEN", "TWELVE"),
    *("THIRTEEN", "FOURTEEN", "FIFTEEN", "SIXTEEN", "SEVENTEEN", "EIGHTEEN", "NINETEEN"),
)
_TENS = ("TWENTY", "THIRTY", "FORTY", "FIFTY", "SIXTY", "SEVENTY", "EIGHTY", "NINETY")
_LARGE = ((10**9, "BILLION"), (10**6, "MILLION"), (1000, "THOUSAND"), (100, "HUNDRED"))
_ORDINALS = {
    "ONE": "FIRST", "TWO": "SECOND", "THREE": "THIRD", "FIVE": "FIFTH", "EIGHT": "EIGHTH", "NINE": "NINTH",
    "TWELVE": "TWELFTH",
}  # fmt: skip
_SHORT = {"MR": "MISTER", "MRS": "MISSUS", "DR": "DOCTOR"}


def num_errors(transcript: str, text: str) -> int:
    """Return the number of word errors of the reading that is closest to the transcript."""
    return min(edit_distance(words(transcript), reading) for reading in readings(text))


def readings(text: str) -> list[list[str]]:
    """Return the word sequences that a text may stand for. Numbers are read as a whole, digit by digit, or in pairs.

    "735" is SEVEN HUNDRED THIRTY FIVE, SEVEN THREE FIVE, or SEVEN THIRTY FIVE. Scoring uses the reading with the fewest
    errors, so conventions for writing numbers do not affect the score.
    """
    found: list[list[str]] = []
    for read in (cardinal, _digits, _pairs):
        reading = _read(text, read)
        if reading not in found:
            found.append(reading)
    return found


def _read(text: str, read: Callable[[int], str]) -> list[str]:
    text = re.sub(r"(\d+)(st|nd|rd|th)\b", lambda found: f" {ordinal(int(found[1]))} ", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(?<=\d)\s*([AaPp])\.?[Mm]\b", r" \1 M", text)
    text = text.replace("%", " percent ").replace("&", " and ")
    text = re.sub(r"\d+", lambda found: f" {_in_words(found[0], read)} ", text)
    return [word for item in words(text) for word in _SHORT.get(item, item).split()]


def _in_words(digits: str, read: Callable[[int], str]) -> str:
    """Return a number in words. Leading zeros are read one by one."""
    number = digits.lstrip("0")
    zeros = ["ZERO"] * (len(digits) - len(number))
    return " ".join((*zeros, read(int(number)))) if number else " ".join(zeros)


def cardinal(number: int) -> str:
    """Return a number from 0 in words, without "and": 1234 is ONE THOUSAND TWO HUNDRED THIRTY FOUR."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return " ".join((_TENS[number // 10 - 2], *([_UNITS[number % 10]] if number % 10 else [])))
    size, name = next((size, name) for size, name in _LARGE if number >= size)
    return " ".join((cardinal(number // size), name, *([cardinal(number % size)] if number % size else [])))


def ordinal(number: int) -> str:
    """Return an ordinal number in words: 21 is TWENTY FIRST."""
    *head, last = cardinal(number).split()
    regular = (last[:-1] + "IE" if last.endswith("Y") else last) + "TH"
    return " ".join((*head, _ORDINALS.get(last, regular)))


def _digits(number: int) -> str:
    return " ".join(_UNITS[int(digit)] for digit in str(number))


def _pairs(number: int) -> str:
    """Return a number read in pairs of digits, like times and years: 1984 is NINETEEN EIGHTY FOUR."""
    text = str(number)
    parts = [text[: len(text) % 2], *(text[start : start + 2] for start in range(len(text) % 2, len(text), 2))]
    return " ".join(_in_words(part, cardinal) for part in parts if part)
