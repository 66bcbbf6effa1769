"""Inverse text normalization of English. Ordered rules write numbers, times, dates, money and percentages in digits.

As in style guides, numbers below ten stay words unless a unit follows: "two dogs", "12 dogs", "2 million", "$2", "2%".
Three or more digits that are spoken one by one are joined.
"""

from collections.abc import Sequence
from typing import NamedTuple

UNITS = dict(zip(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), range(1, 10), strict=True))
_TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TEENS = dict(zip(_TEENS, range(10, 20), strict=True))
TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ZEROS = ("zero", "oh")
_NUMBERS = {*UNITS, *TEENS, *TENS, *SCALES, *_ZEROS, "hundred"}
_ORDINALS = {
    **{f"{word}th": word for word in (*UNITS, *TEENS, *SCALES, "hundred")},
    **{f"{word[:-1]}ieth": word for word in TENS},
    "first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine",
    "twelfth": "twelve",
}  # fmt: skip
"""For each last word of an ordinal, the cardinal: "three" for "third"."""
_MOST_WORDS = 20  # maximum number of words in an ordinal below a billion, including "and"

MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
VERBS = ("march", "may")
"""Month names that usually mean something else, unless an ordinal follows."""
_CURRENCIES = {"dollar": "$", "dollars": "$", "euro": "\u20ac", "euros": "\u20ac"}
_WITHIN = ("and", "point", "of", "hundred", *SCALES, "p", *_CURRENCIES)
"""Words that no rule begins with, but that a rule may read after other words."""
_READ_ON = {*_NUMBERS, *_ORDINALS, *MONTHS, *_WITHIN, "a"}  # words after which a rule may read the next word
_AFTER_DATES = (
    "", "and", "or", "but", "so", "then", "at", "on", "in", "to", "from", "until", "till", "by", "for", "with", "as",
    "the", "i", "you", "he", "she", "it", "we", "they", "this", "that", "there", "is", "was", "will", "would", "if",
    "when", "because", "before", "after", "today", "tonight", "tomorrow", "yesterday", "please", "monday", "tuesday",
    "wednesday", "thursday", "friday", "saturday", "sunday",
)  # fmt: skip
"""Words that may follow a date, time or amount of money, and that a number cannot count. The empty word is the end of
the text."""
_COUNTED = ("percent", "cent", "cents", "degrees", *_CURRENCIES)
_HALVES = ("half", "quarter", "quarters")
_PLURALS = (*(f"{word[:-1]}ies" for word in TENS), "hundreds", "thousands", "millions", "billions")
_HALVES_OF_DAY = {"am": "a.m.", "a.m.": "a.m.", "pm": "p.m.", "p.m.": "p.m."}
_BEFORE_TIMES = ("at", "by", "until", "till", "from", "to", "around", "before", "after", "since")

Found = tuple[int, int] | None
"""A number, and the position after its words; None if there is no number."""


class Written(NamedTuple):
    """A written word, and the range of spoken words, `begin` to `end` (exclusive), that it replaces.

    In scripts without spaces: a written text, and the range of characters that it replaces.
    """

    text: str
    begin: int
    end: int


def write(words: Sequence[str]) -> list[Written]:
    """Convert lower-case spoken words to written words. Each spoken word belongs to exactly one written word."""
    written: list[Written] = []
    place = 0
    while place < len(words):
        found = next(filter(None, (rule(words, place) for rule in RULES)), None)
        written += found or [Written(words[place], place, place + 1)]
        place = written[-1].end
    return written


def num_settled(words: Sequence[str]) -> int:
    """Return the number of leading spoken words whose written form no later word can change.

    Rules read words of numbers, dates and amounts, and stop at any other word. Therefore, only number, date and amount
    words at the end are not settled.
    """
    begin = len(words)
    while begin and words[begin - 1] in _READ_ON:
        begin -= 1
    while begin < len(words) and words[begin] in _WITHIN:
        begin += 1
    return begin


def _date(words: Sequence[str], place: int) -> list[Written] | None:
    """Convert a month with a day, a year or both: "may fifth twenty twenty six" -> "may 5, 2026"."""
    month = words[place]
    if month not in MONTHS:
        return None
    day = ordinal(words, place + 1)
    if day is None and month not in VERBS:
        day = below_hundred(words, place + 1)
        if day and word_at(words, day[1]) not in _AFTER_DATES and not _year(words, day[1]):
            day = None  # the number may count what follows: "in june two people"
    if day is None and month not in VERBS:
        found = _year(words, place + 1)
        return found and [Written(month, place, place + 1), Written(str(found[0]), place + 1, found[1])]
    if day is None or not 1 <= day[0] <= 31 or _year(words, place + 1):
        return None
    found = _year(words, day[1])
    written = [Written(month, place, place + 1), Written(f"{day[0]}{',' if found else ''}", place + 1, day[1])]
    return [*written, Written(str(found[0]), day[1], found[1])] if found else written


def _time(words: Sequence[str], place: int) -> list[Written] | None:
    """Convert a time followed by "a.m.", "p.m." or "o'clock", or a time with minutes after a word such as "at"."""
    hour = below_hundred(words, place)
    if hour is None or not 1 <= hour[0] <= 12:
        return None
    minutes, end = "", hour[1]
    if word_at(words, end) == "oh" and word_at(words, end + 1) in UNITS:
        minutes, end = f":0{UNITS[words[end + 1]]}", end + 2
    elif (found := below_hundred(words, end)) and 10 <= found[0] <= 59:
        minutes, end = f":{found[0]}", found[1]
    before, following = word_at(words, place - 1), word_at(words, end)
    half, after = _HALVES_OF_DAY.get(following, ""), end + 1
    if not half and word_at(words, after) == "m":  # two words: "a m"
        half, after = _HALVES_OF_DAY.get(f"{following}m", ""), end + 2
    if half:
        return [Written(f"{hour[0]}{minutes}", place, end), Written(half, end, after)]
    if not minutes and following == "o'clock":
        return [Written(str(hour[0]), place, end), Written("o'clock", end, end + 1)]
    is_open = following not in _COUNTED and not _goes_on(words, end) if before == "at" else following in _AFTER_DATES
    return [Written(f"{hour[0]}{minutes}", place, end)] if minutes and before in _BEFORE_TIMES and is_open else None


def _year(words: Sequence[str], place: int) -> tuple[int, int] | None:
    """Read a year, also in the form "two thousand five" or "nineteen hundred"."""
    found = year(words, place) or cardinal(words, place)
    return found if found and 1000 <= found[0] <= 2999 and word_at(words, place) != "a" else None


def _spoken_year(words: Sequence[str], place: int) -> list[Written] | None:
    """Convert a year that is spoken in two halves."""
    found = year(words, place)
    return None if found is None or _goes_on(words, found[1]) else [Written(str(found[0]), place, found[1])]


def _quantity(words: Sequence[str], place: int) -> list[Written] | None:
    """Convert a number, including its decimals and any currency, "percent" or scale after it."""
    before = word_at(words, place - 1)
    found = cardinal(words, place, with_and=before != "between")
    if found is None:
        return None
    number, end = found
    is_part = before in _HALVES or (before == "of" and word_at(words, place - 2) in _HALVES)
    if words[place] == "a" and (number < 1000 or is_part):  # "a hundred times", "half a million"
        return None
    text, end = _decimal(words, number, end)
    is_decimal = "." in text
    if is_decimal and number == 1 and before == "at" and word_at(words, end) not in (*_COUNTED, *SCALES):
        return None  # "at one point two of them"
    scale = word_at(words, end) if is_decimal and word_at(words, end) in SCALES else ""
    last = words[end - 1]
    if number >= 10**6 and last in SCALES and last != "thousand" and number % SCALES[last] == 0 and end - 1 > place:
        scale, text, end = last, f"{number // SCALES[last]:,}", end - 1  # "2 million"
    after = end + bool(scale)
    following = word_at(words, after)
    if _goes_on(words, after) or following in _PLURALS:
        return _as_spoken(words, place)
    if following in _CURRENCIES:
        return _money(words, place, text, end, scale)
    if following == "percent" and not scale:
        return [Written(f"{text}%", place, after + 1)]
    if scale:
        return [Written(text, place, end), Written(scale, end, end + 1)]
    return [Written(text, place, end)] if is_decimal or number >= 10 else None


def _decimal(words: Sequence[str], number: int, end: int) -> tuple[str, int]:
    """Return a number in digits, with any decimals after "point", and the position after the number."""
    if word_at(words, end) == "point":
        if spoken := digits(words, end + 1):
            return f"{number}.{spoken[0]}", spoken[1]
        found = (0, end + 2) if word_at(words, end + 1) in _ZEROS else below_hundred(words, end + 1)
        if found:  # "three point fourteen"
            return f"{number}.{found[0]}", found[1]
    return f"{number:,}" if number >= 10_000 else str(number), end


def _money(words: Sequence[str], place: int, text: str, end: int, scale: str) -> list[Written]:
    """Convert an amount of money, with cents if they follow."""
    after = end + bool(scale)
    sign = _CURRENCIES[words[after]]
    if scale:  # the sign replaces the currency, and the words stay in order
        return [Written(f"{sign}{text}", place, end), Written(scale, end, after + 1)]
    following = after + 1 + (word_at(words, after + 1) == "and")
    cents = below_hundred(words, following)
    if cents and "." not in text:
        last = word_at(words, cents[1])
        if last in ("cent", "cents"):
            return [Written(f"{sign}{text}.{cents[0]:02}", place, cents[1] + 1)]
        if cents[0] >= 10 and following == after + 1 and last in _AFTER_DATES:  # "one dollar twenty five"
            return [Written(f"{sign}{text}.{cents[0]}", place, cents[1])]
    return [Written(f"{sign}{text}", place, after + 1)]


def _digits(words: Sequence[str], place: int) -> list[Written] | None:
    """Convert digits spoken one by one, such as a telephone number."""
    found = digits(words, place)
    if not found or len(found[0]) < 3:
        return None
    return _as_spoken(words, place) if _goes_on(words, found[1]) else [Written(found[0], place, found[1])]


def _ordinal(words: Sequence[str], place: int) -> list[Written] | None:
    """Convert ordinals from "tenth" upwards, and smaller ones if "of" and a month follow, but no fractions."""
    found = ordinal(words, place)
    if found is None:
        return None
    if words[place] in ("a", "one") and found[1] == place + 2:  # "one hundredth of a second"
        return _as_spoken(words, place, found[1])
    if word_at(words, place - 1) == "a" or _is_number(words, place - 1):  # "a tenth", "two tenth"
        return None
    is_day = word_at(words, found[1]) == "of" and word_at(words, found[1] + 1) in MONTHS
    suffix = "th" if 10 <= found[0] % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(found[0] % 10, "th")
    return [Written(f"{found[0]}{suffix}", place, found[1])] if found[0] >= 10 or is_day else None


def _as_spoken(words: Sequence[str], place: int, end: int = 0) -> list[Written]:
    """Keep ambiguous number words as spoken, from `place` up to `end` (0: to the end of the number)."""
    if not end:
        end = place + 1
        while _is_number(words, end):
            end += 1
    return [Written(words[number], number, number + 1) for number in range(place, end)]


def _goes_on(words: Sequence[str], place: int) -> bool:
    """Return whether a number continues at a position. An "oh" continues it only before another number."""
    return _is_number(words, place) and (words[place] != "oh" or _is_number(words, place + 1))


def _is_number(words: Sequence[str], place: int) -> bool:
    return word_at(words, place) in _NUMBERS


RULES = (_date, _time, _spoken_year, _digits, _ordinal, _quantity)
"""All rules, which convert the spoken words that start at a position, or return None. The first that applies wins."""


def word_at(words: Sequence[str], place: int) -> str:
    """Return the word at a position, or "" outside the text."""
    return words[place] if 0 <= place < len(words) else ""


def below_hundred(words: Sequence[str], place: int) -> Found:
    """Read a number from 1 to 99."""
    word = word_at(words, place)
    if word in TENS:
        unit = UNITS.get(word_at(words, place + 1), 0)
        return TENS[word] + unit, place + 1 + bool(unit)
    number = UNITS.get(word) or TEENS.get(word)
    return (number, place + 1) if number else None


def cardinal(words: Sequence[str], place: int, *, with_and: bool = True) -> Found:
    """Read a whole number, optionally with "and": "two thousand five hundred and six", "a hundred", "zero"."""
    if word_at(words, place) == "zero":
        return 0, place + 1
    found: Found = None
    scale = 10**15
    while scale > 1:
        begins = place + (found is not None and with_and and word_at(words, place) == "and")
        group = _group(words, begins, with_and=with_and)
        if group is None or (begins > place and group[0] >= 100):
            break
        number, after = group
        following = SCALES.get(word_at(words, after), 1)
        if following >= scale or (following == 1 and found is not None and number >= 1000):
            break
        place, scale = after + (following > 1), following
        found = (found[0] if found else 0) + number * following, place
    return found


def ordinal(words: Sequence[str], place: int) -> Found:
    """Read an ordinal of one or more words, such as "third", "twenty first" or "hundredth"."""
    for end in range(min(len(words), place + _MOST_WORDS), place, -1):
        if last := _ORDINALS.get(words[end - 1]):
            is_short = end - 1 == place and last in ("hundred", *SCALES)  # "hundredth"
            spoken = ["one", last] if is_short else [*words[place : end - 1], last]
            found = cardinal(spoken, 0)
            if found and found[1] == len(spoken):
                return found[0], end
    return None


def digits(words: Sequence[str], place: int) -> tuple[str, int] | None:
    """Read at least two digits spoken one by one: "oh five", "one two three". They must not all be "oh"."""
    found, end = "", place
    while (word := word_at(words, end)) in UNITS or word in _ZEROS:
        found += str(UNITS.get(word, 0))
        end += 1
    return (found, end) if len(found) > 1 and any(word != "oh" for word in words[place:end]) else None


def year(words: Sequence[str], place: int) -> Found:
    """Read a year from 1300 to 2099 in two halves: "nineteen eighty four", "twenty oh five"."""
    first = below_hundred(words, place)
    if first is None or not 13 <= first[0] <= 20:
        return None
    century, place = first
    if word_at(words, place) in _ZEROS and word_at(words, place + 1) in UNITS:
        return 100 * century + UNITS[words[place + 1]], place + 2
    second = below_hundred(words, place)
    return (100 * century + second[0], second[1]) if second and second[0] >= 10 else None


def _group(words: Sequence[str], place: int, *, with_and: bool) -> Found:
    """Read a number up to 9999 spoken without "thousand": "five hundred and six", "nineteen hundred", "a hundred"."""
    following = word_at(words, place + 1)
    if word_at(words, place) == "a" and (following == "hundred" or following in SCALES):
        found: Found = (1, place + 1)
    else:
        found = below_hundred(words, place)
    if found is None or word_at(words, found[1]) != "hundred":
        return found
    number, end = 100 * found[0], found[1] + 1
    rest = below_hundred(words, end + (with_and and word_at(words, end) == "and"))
    # unless it begins another number: "five hundred and six hundred"
    return (number + rest[0], rest[1]) if rest and word_at(words, rest[1]) != "hundred" else (number, end)
