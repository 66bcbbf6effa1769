"""Phrases in prompts of other APIs, the text that a segment adds to a transcript, languages of a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence

from u2moe.runtime.text.vocabulary import join_texts

_SEPARATORS = re.compile(r"[,;\n\r\u3001\uff0c\uff1b]+")
_HAN = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z]")
_EDGES = " \t.!?\"'()[]:\u3002"


def phrases_of(prompt: str) -> list[str]:
    """Phrases between commas, semicolons and line ends, without punctuation around them."""
    phrases = (phrase.strip(_EDGES) for phrase in _SEPARATORS.split(prompt))
    return [phrase for phrase in phrases if phrase]


def added_text(before: Sequence[str], text: str) -> str:
    """The text to append to the transcript of the segments `before`, including a space if needed."""
    return join_texts([*before, text])[len(join_texts(before)) :]


def languages_of(symbols: Sequence[str]) -> list[str]:
    """Languages of a model by its vocabulary, Chinese and English, which are those of WeNet's models.

    Symbols in angle brackets, such as `<blank>`, are no text.
    """
    text = "".join(symbol for symbol in symbols if not symbol.startswith("<"))
    return [code for code, letters in (("zh", _HAN), ("en", _LATIN)) if letters.search(text)]
