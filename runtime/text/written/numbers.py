"""Numbers in English words: cardinals, ordinals, digits and years, from a place in a list of words. Knows no context.

Each function returns the number and the place after its last word, or None if none begins there.
"""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = {word: number for number, word in enumerate(_UNITS, start=1)}
TEENS = {word: number for number, word in enumerate(_TEENS, start=10)}
TENS = {word: 10 * number for number, word in enumerate(_TENS, start=2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_IRREGULAR = {
    "first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine",
    "twelfth": "twelve",
}  # fmt: skip
_ZEROS = ("zero", "oh")
_MOST_WORDS = 20
"""Words of an ordinal: of numbers below a billion, with "and"."""

Found = tuple[int, int] | None


def word_at(words: Sequence[str], place: int) -> str:
    """The word at a place; an empty one after the last."""
    return words[place] if 0 <= place < len(words) else ""


def below_hundred(words: Sequence[str], place: int) -> Found:
    """A number from 1 to 99."""
    word = word_at(words, place)
    if word in TENS:
        unit = UNITS.get(word_at(words, place + 1), 0)
        return TENS[word] + unit, place + 1 + bool(unit)
    number = UNITS.get(word) or TEENS.get(word)
    return (number, place + 1) if number else None


def cardinal(words: Sequence[str], place: int, *, with_and: bool = True) -> Found:
    """A number from 0: "two thousand five hundred and six", "a hundred", "zero"; or without "and" in it."""
    if word_at(words, place) == "zero":
        return 0, place + 1
    total, scale, end = 0, 10**15, None
    while True:
        begins = place + (end is not None and with_and and word_at(words, place) == "and")
        group = _group(words, begins, with_and=with_and)
        if group is None or (begins > place and group[0] >= 100):
            return None if end is None else (total, end)
        number, after = group
        following = SCALES.get(word_at(words, after), 1)
        if following >= scale or (following == 1 and end is not None and number >= 1000):
            return None if end is None else (total, end)
        total += number * following
        place = end = after + (following > 1)
        scale = following
        if following == 1:
            return total, end


def ordinal(words: Sequence[str], place: int) -> Found:
    """A number from 1 as in "twenty first" or "hundredth"; also without a number before: "third"."""
    for end in range(min(len(words), place + _MOST_WORDS), place, -1):
        last = _of_ordinal(words[end - 1])
        if last is None:
            continue
        found = cardinal([*words[place : end - 1], last], 0)
        if found is None and last in ("hundred", *SCALES):
            found = cardinal(["one", last], 0)
            if found and end - 1 == place:
                return found[0], end
            continue
        if found and found[1] == end - place:
            return found[0], end
    return None


def digits(words: Sequence[str], place: int) -> tuple[str, int] | None:
    """Digits that are spoken one by one, at least two: "oh five", "one two three"; "oh" alone is none."""
    found, end = "", place
    while (word := word_at(words, end)) in UNITS or word in _ZEROS:
        found += str(UNITS.get(word, 0))
        end += 1
    is_number = any(word != "oh" for word in words[place:end])
    return (found, end) if len(found) > 1 and is_number else None


def year(words: Sequence[str], place: int) -> Found:
    """A year from 1300 to 2099 in two halves: "nineteen eighty four", "twenty oh five"."""
    first = below_hundred(words, place)
    if first is None or not 13 <= first[0] <= 20:
        return None
    century, place = first
    if word_at(words, place) in _ZEROS and word_at(words, place + 1) in UNITS:
        return 100 * century + UNITS[words[place + 1]], place + 2
    second = below_hundred(words, place)
    return (100 * century + second[0], second[1]) if second and second[0] >= 10 else None


def suffixed(number: int) -> str:
    """An ordinal in digits: 21 -> "21st"."""
    suffix = "th" if 10 <= number % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _group(words: Sequence[str], place: int, *, with_and: bool) -> Found:
    """A number from 1 to 9999 without thousands: "five hundred and six", "nineteen hundred", "a" before hundred."""
    following = word_at(words, place + 1)
    if word_at(words, place) == "a" and (following == "hundred" or following in SCALES):
        found: Found = (1, place + 1)
    else:
        found = below_hundred(words, place)
    if found is None or word_at(words, found[1]) != "hundred":
        return found
    number, end = 100 * found[0], found[1] + 1
    rest = below_hundred(words, end + (with_and and word_at(words, end) == "and"))
    # not the beginning of another number: "five hundred and six hundred"
    return (number + rest[0], rest[1]) if rest and word_at(words, rest[1]) != "hundred" else (number, end)


def _of_ordinal(word: str) -> str | None:
    """The cardinal of the last word of an ordinal."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ieth") and word[:-4] + "y" in TENS:
        return word[:-4] + "y"
    regular = word.removesuffix("th")
    is_regular = regular != word and (regular in UNITS or regular in TEENS or regular in ("hundred", *SCALES))
    return regular if is_regular else None
