"""Spells words with the symbols of a vocabulary: the reverse of `Vocabulary.text`."""

import functools
from itertools import pairwise

from u2moe.runtime.text.vocabulary import WORD_BOUNDARY, Vocabulary, is_special, stands_alone


class Spelling:
    """Spells words with the symbols of a vocabulary. Messages of its ValueErrors begin with the argument `what`."""

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

    def num_tokens(self, word: str, what: str) -> int:
        """Return the number of tokens in the shortest tokenization of a word in the vocabulary's letter case."""
        spelled = list(filter(None, map(self._shortest, (word, WORD_BOUNDARY + word))))
        if not spelled:
            raise ValueError(f"{what}: the vocabulary cannot spell {word!r}")
        return min(map(len, spelled))

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
