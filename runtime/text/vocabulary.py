"""The vocabulary: conversion of token ids to text and words, and spelling of words with its symbols."""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from u2moe.runtime.errors import BundleError

WORD_BOUNDARY = "\u2581"
"""LOWER ONE EIGHTH BLOCK: begins a word in BPE vocabularies, and is a space in character vocabularies."""
UNREADABLE = "\0"
"""Replaces symbols that are not text, such as <unk>. It is neither part of a word nor a word boundary."""

_SPACELESS = (
    "\u2e80-\u312f"  # radicals, kana, bopomofo
    "\u3190-\u9fff"  # bopomofo, unified ideographs
    "\uf900-\ufaff"  # compatibility ideographs
    "\uff66-\uff9f"  # half-width katakana
    "\U0001b000-\U0001b2ff"  # kana supplements
    "\U00020000-\U0003ffff"  # ideographs of the supplementary planes
)
_HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"  # Jamo, compatibility Jamo, Jamo extended A, syllables
_STANDING_ALONE, _SYLLABIC = re.compile(f"[{_SPACELESS}]+"), re.compile(f"[{_SPACELESS}{_HANGUL}]+")


def parse_tokens(
    content: str, *, file: str = "tokens.txt", error: Callable[[str], Exception] = BundleError
) -> list[str]:
    """Return symbols in the order of their ids, from lines of "symbol id", as in tokens.txt and units.txt.

    A symbol may be any text without a line feed, even a space. The id follows the last space or tab. `error` makes the
    error, which names `file`, if a line has no id, or if the ids are not exactly 0..n-1.
    """
    symbols: dict[int, str] = {}
    for number, raw_line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1):
        line = raw_line.rstrip(" \t\r")
        if not line:
            continue
        cut = max(line.rfind(" "), line.rfind("\t"))
        symbol, digits = line[:cut], line[cut + 1 :]
        if cut < 1 or not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise error(f"{file}: line {number} must be 'symbol id', got {line[:80]!r}")
        if int(digits) in symbols:
            raise error(f"{file}: line {number}: id {int(digits)} already belongs to {symbols[int(digits)]!r}")
        symbols[int(digits)] = symbol
    missing = next((i for i in range(len(symbols)) if i not in symbols), None)
    if missing is not None:
        raise error(f"{file}: no symbol has id {missing}, expected ids 0 to {len(symbols) - 1}")
    return [symbols[i] for i in range(len(symbols))]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How to convert token ids to text."""

    tokenizer: Literal["char", "bpe"] = "char"
    """"char": symbols are concatenated; "bpe": U+2581 begins a word."""
    unk: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer not in ("char", "bpe"):
            raise ValueError(f"tokenizer must be 'char' or 'bpe', got {self.tokenizer!r}")


@dataclass(frozen=True, kw_only=True)
class Word:
    """Tokens `begin` to `end` (exclusive) of a hypothesis, and their text without surrounding spaces."""

    text: str
    begin: int
    end: int


class Vocabulary:
    """Symbols by id, and the rules for joining them into text and words.

    In character vocabularies (WeNet's `char`), symbols are concatenated and U+2581 becomes a space, whereas WeNet
    outputs U+2581 itself. In BPE vocabularies, U+2581 begins a word. In vocabularies of either kind, every symbol of a
    script without spaces (Chinese, Japanese) is a word.
    """

    def __init__(self, symbols: Sequence[str], config: TextConfig) -> None:
        self.symbols = tuple(symbols)
        self.config = config

    def __len__(self) -> int:
        return len(self.symbols)

    @functools.cached_property
    def has_spaceless(self) -> bool:
        """Whether any symbol belongs to a script without spaces."""
        return any(stands_alone(character) for symbol in self.symbols for character in symbol)

    @functools.cached_property
    def convert_case(self) -> Callable[[str], str]:
        """Function that converts words to the letter case of the symbols; `str` if these contain both cases."""
        text = "".join(symbol for symbol in self.symbols if not is_special(symbol))
        return str.upper if text == text.upper() else str.lower if text == text.lower() else str

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without leading and trailing spaces."""
        return " ".join("".join(self.symbols[token] for token in tokens).replace(WORD_BOUNDARY, " ").split())

    def words(self, tokens: Sequence[int]) -> list[Word]:
        """Split token ids into words: at U+2581 and spaces, and around symbols of scripts without spaces."""
        words: list[Word] = []
        text, begin, has_ended = "", 0, False
        for index, token in enumerate(tokens):
            part, begins, ends = self._parts[token]
            if text and (begins or has_ended):
                words.append(Word(text=text, begin=begin, end=index))
                text = ""
            if not text:
                begin = index
            text += part
            has_ended = ends
        if text:
            words.append(Word(text=text, begin=begin, end=len(tokens)))
        return words

    def complete_words(self, tokens: Sequence[int], *, ends: bool) -> list[Word]:
        """Return the words of token ids, except a last word that later tokens may continue; none follow if `ends`."""
        words = self.words(tokens)
        if words and words[-1].end == len(tokens) and not (ends or self._parts[tokens[-1]][2]):
            words.pop()
        return words

    @functools.cached_property
    def word_starts(self) -> bytes:
        """For each token, 1 if it begins a word, else 0."""
        return bytes(begins for _, begins, _ in self._parts)

    @functools.cached_property
    def _parts(self) -> list[tuple[str, bool, bool]]:
        """For each token: the part of a word that it spells, whether it begins a word, and whether it ends a word."""
        parts = []
        for spelled in self.symbols:
            symbol = spelled.replace(WORD_BOUNDARY, " ")
            part = symbol.strip()
            alone = stands_alone(part)
            parts.append((part, alone or symbol.startswith(" "), alone or symbol.endswith(" ")))
        return parts


def join_texts(texts: Sequence[str]) -> str:
    """Join non-empty texts with a space between them, except next to characters of scripts without spaces."""
    joined = ""
    for text in texts:
        apart = joined and not stands_alone(joined[-1]) and not stands_alone(text[0])
        joined += f" {text}" if apart else text
    return joined


def stands_alone(symbol: str) -> bool:
    """Return whether a symbol belongs to a script without spaces, which makes it a word by itself."""
    return bool(_STANDING_ALONE.fullmatch(symbol))


@functools.cache
def combining_marks() -> str:
    """Return combining marks (accents, vowel signs) and joiners, for use in a character class of `re`.

    `re` does not count marks as letters. Without them, words in Hindi, Tamil or decomposed Latin would be split.
    """
    blocks = (range(0x300, 0x1F000), range(0xE0100, 0xE01F0))
    marks = (chr(code) for block in blocks for code in block if unicodedata.category(chr(code))[0] == "M")
    return "\u200c\u200d" + "".join(marks)


def is_special(symbol: str) -> bool:
    """Return whether a symbol or word is a marker, such as <s>, <unk> or the name of a class."""
    return len(symbol) > 2 and symbol.startswith("<") and symbol.endswith(">")


def with_boundaries(symbol: str, is_word: Callable[[str], bool] = stands_alone) -> str:
    """Return a symbol or phrase with `WORD_BOUNDARY` in place of spaces, and around characters that are words."""
    if is_special(symbol):
        return UNREADABLE
    spaced = "".join(f" {character} " if is_word(character) else character for character in symbol)
    return re.sub(rf"[\s{WORD_BOUNDARY}]+", WORD_BOUNDARY, spaced)


def is_syllabic(symbol: str) -> bool:
    """Return whether a symbol belongs to a script without spaces, or to Hangul (Korean attaches endings to words)."""
    return bool(_SYLLABIC.fullmatch(symbol))


class Spelling:
    """Spells words with a vocabulary's symbols: the reverse of `Vocabulary.text`. Its ValueErrors begin with `what`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        symbols = enumerate(vocabulary.symbols)
        self._ids = {symbol.replace(" ", WORD_BOUNDARY): number for number, symbol in symbols if not is_special(symbol)}
        self._is_bpe = vocabulary.config.tokenizer == "bpe"
        self._characters = set("".join(self._ids)) - {WORD_BOUNDARY}
        self._longest = max(map(len, self._ids), default=0)

    def word(self, word: str, what: str) -> str:
        """Return a word in the letter case of the vocabulary."""
        found = ""
        for character in word:
            forms = [form for form in (character, character.upper(), character.lower()) if form in self._characters]
            if not forms:
                raise ValueError(f"{what}: the vocabulary has no {character!r}")
            found += forms[0]
        return found

    def phrase(
        self, phrase: str, what: str, is_word: Callable[[str], bool] = stands_alone
    ) -> tuple[tuple[str, ...], int]:
        """Return a phrase's words in the vocabulary's letter case, and their fewest tokens; see `with_boundaries`."""
        parts = with_boundaries(phrase, is_word).replace(WORD_BOUNDARY, " ").split()
        words, num_tokens = tuple(self.word(part, what) for part in parts), 0
        for word in words:
            spelled = list(filter(None, map(self._shortest, (word, WORD_BOUNDARY + word))))
            if not spelled:
                raise ValueError(f"{what}: the vocabulary cannot spell {word!r}")
            num_tokens += min(map(len, spelled))
        return words, num_tokens

    def tokens(self, each: str, before: str, what: str) -> list[int]:
        """Return the token ids that a model outputs for a word, in any letter case, after the word `before` ("": none).

        If the ids follow the order of BPE merges, words are split by BPE, as in SentencePiece. Otherwise, words are
        split into as few tokens as possible.
        """
        word = self.word(each, what)
        is_apart = self._is_bpe or bool(before and not stands_alone(word) and not stands_alone(before))
        divide = self._merged if self._is_merged else self._shortest
        is_marked = is_apart and not (stands_alone(word) and word in self._ids)
        parts = (divide(WORD_BOUNDARY + word) if is_marked else None) or divide(word)
        if not parts:
            raise ValueError(f"{what}: the vocabulary cannot spell {word!r}")
        return [self._ids[part] for part in parts]

    @functools.cached_property
    def _is_merged(self) -> bool:
        """Whether ids are in BPE's merge order. Only then does BPE restore each symbol from its characters."""
        return all(self._merged(symbol) == [symbol] for symbol in self._ids)

    def _merged(self, text: str) -> list[str] | None:
        """Divide a text into symbols by BPE, merging the pair with the lowest id first; None if that is impossible."""
        parts = list(text)
        while pairs := [(self._ids[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in self._ids]:
            _, place = min(pairs)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        return parts if all(part in self._ids for part in parts) else None

    def _shortest(self, text: str) -> list[str] | None:
        """Divide a text into as few symbols as possible. Return None if it cannot be divided."""
        found: list[list[str] | None] = [[]]
        for end in range(1, len(text) + 1):
            begins = range(max(end - self._longest, 0), end)
            ways = [[*way, text[i:end]] for i in begins if text[i:end] in self._ids and (way := found[i]) is not None]
            found.append(min(ways, key=len, default=None))
        return found[-1]
