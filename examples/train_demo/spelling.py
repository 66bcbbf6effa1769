"""The spelling of texts in training, testing and scoring: upper case, with numbers in words."""
# ruff: noqa: SIM905 - lists of words read better as words

import re

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip


def cardinal(number: int) -> str:
    """Return the number in words, without "and": 1234 -> "one thousand two hundred thirty four"."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {UNITS[number % 10]}" if number % 10 else "")
    for size, name in ((1_000_000_000, "billion"), (1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {cardinal(number % size)}" if number % size else ""
            return f"{cardinal(number // size)} {name}{rest}"
    raise ValueError(f"number must not be negative, got {number}")


def ordinal(number: int) -> str:
    """Return the ordinal in words: 21 -> "twenty first"."""
    *head, last = cardinal(number).split()
    regular = (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return " ".join([*head, ORDINALS.get(last, regular)])


def normalize(text: str) -> str:
    """Return a text in upper-case letters, apostrophes and single spaces, with integers spelled out."""
    text = text.replace("\u2019", "'").replace("&", " and ").replace("%", " percent ")
    text = re.sub(r"(\d+)(st|nd|rd|th)\b", lambda found: f" {ordinal(int(found[1]))} ", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"\d+", lambda found: f" {cardinal(int(found[0]))} ", text)
    text = re.sub(r"[^A-Z']+", " ", text.upper())
    return " ".join(word for word in (word.strip("'") for word in text.split()) if word)
