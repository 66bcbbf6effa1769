"""Sentences to be spoken: game lines, WordNet phrases, and grammars of numbers, dates, times, letters and commands."""
# ruff: noqa: SIM905 - lists of words read better as words

import gzip
import html
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from games import GAMES, table_rows
from spelling import TENS, UNITS, cardinal, normalize, ordinal

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SPELLING = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey x-ray yankee zulu"
).split()
SYMBOLS = (
    "exclamation mark|exclamation point|quotation mark|quote|apostrophe|number sign|hash|dollar sign|percent sign|"
    "ampersand|parenthesis|left parenthesis|right parenthesis|open parenthesis|close parenthesis|open bracket|"
    "close bracket|left brace|right brace|asterisk|star|plus sign|minus sign|hyphen|comma|period|full stop|slash|"
    "forward slash|backslash|colon|semicolon|less than|greater than|equals sign|question mark|at sign|caret|circumflex|"
    "underscore|backtick|tick|grave accent|pipe|vertical bar|tilde|space|blank|tab|new line|new paragraph|enter|escape"
).split("|")
"""Names of keyboard characters, as people dictate them."""
MIN_COUNT = 30
"""Minimum count of a word in the sources for it to be spoken on its own."""
DICTIONARIES = "gcide foldoc jargon devil".split()
"""Dictionaries: Webster's of 1913 and later additions, computing, hackers' slang, and Ambrose Bierce's."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Kate Laura Michael Nora Oliver Peter Rachel Sam Tom "
    "Victor Wendy Smith Johnson Miller Davis Wilson Brown Taylor Anderson Martin Clark Lewis Walker Young King Baker"
).split()


def digits(rng: random.Random, count: int) -> str:
    """Return a string of spoken digits, sometimes in groups, with "oh" for zero now and then."""
    zero = rng.choice(["zero", "zero", "oh"])
    words = [zero if digit == 0 else UNITS[digit] for digit in (rng.randrange(10) for _ in range(count))]
    if count > 5 and rng.random() < 0.5:
        words[count // 2 - 1] += ","
    return " ".join(words)


def quantity(rng: random.Random) -> str:
    """Return a number of random magnitude in words. Small numbers are the most frequent."""
    number = rng.randrange(rng.choice([20, 20, 100, 100, 100, 1000, 10_000, 1_000_000]))
    words = cardinal(number)
    if number > 100 and rng.random() < 0.3:
        words = words.replace(" hundred ", " hundred and ")
    return words


def spoken_time(rng: random.Random) -> str:
    """Return a time of day in one of its usual forms."""
    hour, minute = rng.randrange(1, 13), rng.randrange(60)
    half = rng.choice(["a.m.", "p.m.", "in the morning", "in the evening", "at night", ""])
    exact = "o'clock" if minute == 0 else f"oh {UNITS[minute]}" if minute < 10 else cardinal(minute)
    forms = [
        f"{UNITS[hour]} {exact} {half}",
        f"{UNITS[hour]} o'clock {half}",
        f"half past {UNITS[hour]}",
        f"a quarter {rng.choice(['to', 'past'])} {UNITS[hour]}",
        f"{cardinal(max(minute, 2))} minutes {rng.choice(['to', 'past'])} {UNITS[hour]}",
        f"{UNITS[hour]} hours {cardinal(max(minute, 2))} minutes and {cardinal(rng.randrange(2, 60))} seconds",
        f"{UNITS[hour]} {rng.choice(['hour', 'minute', 'second'])}s",
    ]
    return rng.choice(forms).strip()


def spoken_year(rng: random.Random) -> str:
    """Return a year: "nineteen eighty four", "two thousand five", "twenty twenty six"."""
    year = rng.choice([rng.randrange(1700, 2000), rng.randrange(2000, 2050)])
    if 2000 <= year < 2010:
        return cardinal(year)
    tail = year % 100
    return f"{cardinal(year // 100)} {'hundred' if tail == 0 else f'oh {UNITS[tail]}' if tail < 10 else cardinal(tail)}"


def spoken_date(rng: random.Random) -> str:
    """Return a day, a month, or a date with or without the year."""
    day, month = ordinal(rng.randrange(1, 32)), rng.choice(MONTHS)
    forms = [
        f"{month} {day}",
        f"{month} {day}, {spoken_year(rng)}",
        f"the {day} of {month}",
        f"{rng.choice(DAYS)}, {month} {day}",
        f"{rng.choice(DAYS)} the {day}",
        f"{month} {spoken_year(rng)}",
        rng.choice(DAYS),
        month,
        day,
        f"{rng.choice(['next', 'last', 'on', 'every'])} {rng.choice(DAYS)}",
        rng.choice(["today", "tomorrow", "yesterday", "this morning", "this afternoon", "tonight"]),
    ]
    return rng.choice(forms)


def spelled(rng: random.Random) -> str:
    """Return letters one by one, as letter names or in the spelling alphabet."""
    if rng.random() < 0.25:
        return " ".join(rng.choices(SPELLING, k=rng.choice([1, 1, 2, 3, 4])))
    return ", ".join(rng.choices(LETTERS, k=rng.choice([1, 2, 3, 3, 4, 5, 6])))


COMMANDS = (
    "[go|move|drive|walk] [forward|backward|left|right] <small> [meters|feet|steps|miles|inches|centimeters|degrees]",
    "turn [left|right|around] [|now|<small> degrees]",
    "turn [on|off|up|down] the [|<room>] [light|lights|lamp|heating|radio|television|fan|alarm|music]",
    "[open|close|lock|unlock] the [|<room>] [door|window]",
    "[call|text|find|play|email] <name> [|<name>|at <time>]",
    "set [an alarm|a timer|a reminder] for [<time>|<small> minutes]",
    "set the [volume|temperature|speed] to <small> [|percent|degrees]",
    "[stop|start|pause|play|next|previous|repeat|cancel|continue|help|yes|no|okay|hello|goodbye|undo|delete|save]",
    "[louder please|quieter please|go back|go on|go home|wake up|shut down|send it|next page|read it again]",
    "[stop the music|what time is it|what day is it today|how are you|take a picture|good morning|thank you]",
)
PROMPTS = (
    "[please|if you would like,|] press <key> [now|to continue|to go back|for <thing>|to change <thing>]",
    "to [hear|change|check|cancel|confirm|record] <thing>, press <key>",
    "[please enter|please say|I need|you have changed|we have received] <thing>",
    "you have <number> [new|old|saved|unread] [messages|letters|calls|photos]",
    "the [train|bus|flight|boat] to <name> leaves at <time>",
    "the [meeting|party|lesson|show] is on <date> at <time>",
    "[it costs|you owe|the price is|that makes] <number> [dollars|pounds|euros|cents|dollars and fifty cents]",
    "my [phone|room|account|ticket] number is <digits>",
    "[the line is|all our agents are|this number is] [busy|not available|not in service|disconnected] <later>",
    "I was born [in|on] [<date>|<year>]",
    "[ace|<small>|jack|queen|king] of [hearts|spades|clubs|diamonds]",
    "[welcome|goodbye|thank you for calling|we are sorry|that is wrong] [|, <name>|, please wait|, please try again]",
)
SLOTS: dict[str, Callable[[random.Random], str]] = {
    "small": lambda rng: cardinal(rng.randrange(2, rng.choice([11, 100]))),
    "room": lambda rng: rng.choice(["kitchen", "bedroom", "bathroom", "garage", "hallway", "office", "garden"]),
    "name": lambda rng: rng.choice(NAMES),
    "key": lambda rng: rng.choice([*UNITS[:10], "pound", "star"]),
    "thing": lambda rng: expand(
        "[your account number|your birthday|your order|your balance|a message|the number|your zip code|your name|"
        "your password|the extension|your phone number|the code|your appointment|your reservation]",
        rng,
    ),
    "later": lambda rng: expand("[|at the moment|right now|please try again later|please hold]", rng),
    "number": quantity,
    "digits": lambda rng: digits(rng, rng.randrange(2, 9)),
    "time": spoken_time,
    "date": spoken_date,
    "year": spoken_year,
}


def expand(template: str, rng: random.Random) -> str:
    """Return a random sentence of a template. `[a|b]` is a choice, not nested; `<slot>` is a random value."""
    chosen = re.sub(r"\[([^]]*)\]", lambda found: rng.choice(found[1].split("|")), template)
    return re.sub(r"<(\w+)>", lambda found: SLOTS[found[1]](rng), chosen).replace(" ,", ",")


def command(rng: random.Random) -> str:
    """Return a command to a robot, a phone, a player or a light."""
    return expand(rng.choice(COMMANDS), rng)


def prompt(rng: random.Random) -> str:
    """Return a sentence like those of telephone menus and public announcements."""
    return expand(rng.choice(PROMPTS), rng)


def isolated(rng: random.Random) -> str:
    """Return a single word or number, as said to a telephone."""
    kinds: list[Callable[[], str]] = [
        lambda: rng.choice(UNITS),
        lambda: rng.choice(UNITS[:10]),
        lambda: rng.choice(TENS),
        lambda: rng.choice(LETTERS),
        lambda: rng.choice(LETTERS),
        lambda: rng.choice(SPELLING),
        lambda: ordinal(rng.randrange(1, 32)),
        lambda: ordinal(rng.choice([rng.randrange(1, 21), rng.randrange(1, 100), rng.randrange(10, 100, 10)])),
        lambda: rng.choice("zed niner hundredth thousandth millionth billionth billion trillion dozen".split()),
        lambda: rng.choice(SYMBOLS),
        lambda: rng.choice(DAYS + MONTHS),
        lambda: rng.choice("hundred thousand million minus point and a.m. p.m. o'clock dollars pounds cents".split()),
        lambda: rng.choice("dash dot slash star pound space at plus equals comma".split()),
        lambda: rng.choice("yes no okay stop help cancel next hello goodbye please thanks sorry".split()),
        lambda: rng.choice(
            "second seconds minute minutes hour hours day today tomorrow yesterday noon midnight".split()
        ),
    ]
    return rng.choice(kinds)()


def brief(rng: random.Random) -> str:
    """Return a few words that are said on their own: a number, some letters, a time or a day."""
    kinds: list[Callable[[], str]] = [
        lambda: isolated(rng),
        lambda: digits(rng, rng.choice([1, 2, 2, 3, 3, 4])),
        lambda: ", ".join(rng.choices(LETTERS, k=rng.choice([2, 2, 3]))),
        lambda: quantity(rng),
        lambda: spoken_time(rng),
        lambda: spoken_date(rng),
        lambda: rng.choice(
            "half past quarter past quarter to morning evening afternoon night the time is exactly".split()
        ),
    ]
    return rng.choices(kinds, weights=[62, 10, 6, 6, 6, 6, 4])[0]()


def spelled_name(rng: random.Random) -> str:
    """Return a name and its letters, or only its letters."""
    name = rng.choice(NAMES)
    letters = ", ".join(name.upper())
    return rng.choice([letters, f"{name}, {letters}", f"that is spelled {letters}", f"my name is {name}, {letters}"])


def grammar_line(rng: random.Random) -> str:
    """Return one random line of all grammars."""
    kind = rng.choices(
        [quantity, spoken_time, spoken_date, spelled, spelled_name, command, prompt, spoken_year, isolated, None],
        weights=[11, 12, 11, 7, 3, 15, 17, 2, 10, 12],
    )[0]
    if kind is None:
        return digits(rng, rng.choice([1, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10]))
    line = kind(rng)
    if kind is not isolated and rng.random() < 0.12:
        line += ", " + rng.choice([quantity, spoken_date, command])(rng)
    return " ".join(line.split())


def wordnet_phrases(folder: Path) -> list[str]:
    """Return the quoted example phrases of WordNet that have 2 to 18 words and no digits."""
    phrases = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            for phrase in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                plain = re.fullmatch(r"[A-Za-z',;:.!?() -]+", phrase)
                if plain and 2 <= len(phrase.split()) <= 18:
                    phrases.add(re.sub(r"[()]", "", phrase).strip())
    return sorted(phrases)


def wordnet_definitions(folder: Path) -> list[str]:
    """Return those definitions of WordNet that are plain English of 3 to 14 words."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
            definition = line.partition("|")[2].partition('"')[0].partition(";")[0].strip()
            if 3 <= len(definition.split()) <= 14 and re.fullmatch(r"[a-z', -]+", definition):
                found.add(definition)
    return sorted(found)


def prose_sentences(paths: Iterable[Path]) -> list[str]:
    """Return whole sentences of 3 to 20 plain words from web pages and from texts, which may be compressed."""
    found = set()
    for path in paths:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".dz" else data).decode("utf-8", errors="replace")
        text = html.unescape(re.sub(r"<[^>]*>", " ", text)) if path.suffix == ".html" else text
        for paragraph in re.split(r"\n\s*\n|\n%\n|\n\s*--", text):
            plain = " ".join(paragraph.split()).replace("\u2019", "'")
            for sentence in re.findall(r"(?:^|(?<=[.!?] ))[A-Z][a-z ',;-][A-Za-z ',;-]*[.!?](?= |$|\")", plain):
                words = sentence.split()
                if 3 <= len(words) <= 20 and all(len(word) < 14 for word in words):
                    found.add(sentence)
    return sorted(found)


def without_capitals(line: str) -> str:
    """Return a line without capitals for emphasis ("I'M SURE" -> "I'm sure"). Voices would spell such words."""
    line = re.sub(r"\b[A-Z][A-Z']+\b", lambda found: found[0].lower(), line)
    line = re.sub(r"\bi\b", "I", line)
    return line[:1].upper() + line[1:]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Sources of sentences: the tables of game lines, and the folder of the unpacked Debian packages."""

    debian: Path

    def games(self) -> list[str]:
        """Return the lines of the games, except those of characters in the test and validation sets."""
        rows = [row for game in GAMES for row in table_rows(game, "train")]
        return [without_capitals(row["text"]) for row in rows if float(row["cer"]) < 0.8]

    def wordnet(self) -> list[str]:
        """Return WordNet's example phrases, and a quarter as many of its definitions."""
        folder = self.debian / "usr/share/wordnet"
        phrases, definitions = wordnet_phrases(folder), wordnet_definitions(folder)
        return phrases + definitions[:: max(4 * len(definitions) // len(phrases), 1)]

    def definitions(self) -> list[str]:
        """Return all definitions of WordNet."""
        return wordnet_definitions(self.debian / "usr/share/wordnet")

    def dictionaries(self) -> list[str]:
        """Return whole sentences from dictionaries: definitions, and quotations of older literature in Webster's."""
        return prose_sentences(self.debian / f"usr/share/dictd/{name}.dict.dz" for name in DICTIONARIES)

    def prose(self) -> list[str]:
        """Return fortune cookies and articles."""
        fortunes = (self.debian / "usr/share/games/fortunes").glob("*")
        articles = (self.debian / "usr/share/doc/anarchism").rglob("*.html")
        return prose_sentences(sorted([path for path in fortunes if not path.suffix] + list(articles)))


class Sentences:
    """Sentences to be spoken: 36 % from the grammars, 20 % from the games, the rest from WordNet and prose."""

    def __init__(self, sources: Sources) -> None:
        self.written = [sources.games(), sources.wordnet(), sources.prose()]

    def draw(self, rng: random.Random) -> str:
        """Return a sentence."""
        kind = rng.choices([None, *self.written], weights=[36, 20, 20, 24])[0]
        return grammar_line(rng) if kind is None else rng.choice(kind)


class Words:
    """Words to be spoken on their own. Nine in ten come from the grammars, the rest from the games and WordNet."""

    def __init__(self, sources: Sources) -> None:
        counts = Counter(
            word for line in sources.games() + sources.wordnet() for word in normalize(line).lower().split()
        )
        self.frequent = sorted(word for word, count in counts.items() if count >= MIN_COUNT and len(word) > 2)

    def draw(self, rng: random.Random) -> str:
        """Return one word or a few words."""
        return brief(rng) if rng.random() < 0.9 else rng.choice(self.frequent)


class Written:
    """Sentences of a written source, to be spoken. Each has the same probability."""

    def __init__(self, sentences: list[str]) -> None:
        self.sentences = sentences

    def draw(self, rng: random.Random) -> str:
        """Return a sentence."""
        return rng.choice(self.sentences)
