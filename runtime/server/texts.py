"""Texts in and out: hotwords from what other APIs call a prompt, and the text that a segment adds to a transcript."""

from __future__ import annotations

import re
from collections.abc import Sequence

from u2moe.runtime.text import join_texts

_SEPARATORS = re.compile(r"[,;\n\r\u3001\uff0c\uff1b]+")
_EDGES = " \t.!?\"'()[]:\u3002"


def phrases_of(prompt: str) -> list[str]:
    """Phrases between commas, semicolons and line ends, without punctuation around them."""
    phrases = (phrase.strip(_EDGES) for phrase in _SEPARATORS.split(prompt))
    return [phrase for phrase in phrases if phrase]


def added_text(before: Sequence[str], text: str) -> str:
    """The text to append to the transcript of the segments `before`, including a space if needed."""
    return join_texts([*before, text])[len(join_texts(before)) :]
