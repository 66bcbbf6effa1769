"""Hotwords in what is called a prompt elsewhere."""

from __future__ import annotations

import re

_SEPARATORS = re.compile(r"[,;\n\r\u3001\uff0c\uff1b]+")
_EDGES = " \t.!?\"'()[]:\u3002"


def phrases_of(prompt: str) -> list[str]:
    """Phrases between commas, semicolons and line ends, without punctuation around them."""
    phrases = (phrase.strip(_EDGES) for phrase in _SEPARATORS.split(prompt))
    return [phrase for phrase in phrases if phrase]
