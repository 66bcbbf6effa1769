"""Convert Chinese and Japanese numbers, dates and money to written form with wetext's grammars (extra `written`)."""

from __future__ import annotations

import re
from typing import NamedTuple

_AS_SPOKEN = {
    "zh": ("十分", "十有八九", "一千零一夜", "十一长假", "三百六十行"),
    "ja": ("十分", "八百屋", "七五三", "百人一首", "千葉", "百合"),
}
"""Words and names in which the grammars mistake numerals for numbers. 十分 ("very") also means ten minutes; as part
of a time it is converted."""
_QUARTER = re.compile("点[一三]刻")


class Replaced(NamedTuple):
    """Characters `start` to `end` (exclusive) of a spoken text, and their replacement."""

    start: int
    end: int
    text: str


class Grammars:
    """Finds the parts of a text in "zh" or "ja" whose written form differs from the spoken one.

    Single numerals (as in 千葉), approximate numbers (五六个人), quarter hours, and some words and names stay as
    spoken. The standard GB/T 15835 requires characters for approximate numbers. Quarter hours stay because the grammars
    mistake them for decimals.

    Raises:
        ModuleNotFoundError: wetext is not installed.
    """

    def __init__(self, language: str) -> None:
        from wetext import Normalizer  # noqa: PLC0415 - an extra

        self._normalizer = Normalizer(lang=language, operator="itn")
        self._as_spoken = re.compile("|".join(_AS_SPOKEN[language]))

    def replaced(self, text: str) -> list[Replaced]:
        """Return the parts of a text that change, in order."""
        kept = [found.span() for found in self._as_spoken.finditer(text)]
        parts: list[Replaced] = []
        for each in self._normalizer.normalize_with_mapping(text).mappings:
            start, end, spoken, written = each.input_start, each.input_end, each.input_text, each.output_text
            if each.token_type == "time":  # noqa: S105 - the mapping pads times with zeros
                written = self._normalizer.normalize(spoken)
            is_number = end - start > 1 and "~" not in written and not _QUARTER.search(spoken)
            if is_number and not any(first <= start and end <= last for first, last in kept):
                is_next = parts and parts[-1].end == start and parts[-1].text[-1].isalnum()  # a time after a date
                parts.append(Replaced(start, end, f" {written}" if is_next else written))
        return parts
