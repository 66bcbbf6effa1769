"""An automaton over characters that restricts a search to the phrases of a grammar.

As with hotwords (`context`), a token advances the automaton by the characters of its symbol, so a phrase is allowed in
any tokenization. Deterministic states are built when a search reaches them. Phrases that begin alike share states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from u2moe.runtime.errors import GrammarError
from u2moe.runtime.text.grammar import UNKNOWN, Expression, Grammar, check_nested
from u2moe.runtime.text.vocabulary import WORD_BOUNDARY, Spelling, Vocabulary, with_boundaries

REST_PENALTY, REST_COST = 0.5, 3.0
"""Costs of `[unk]`. Its log-probability in a frame is that of the most probable token except blank, minus
`REST_PENALTY`. `REST_COST` is subtracted each time an `[unk]` begins. A phrase between other words has one `[unk]`
before it and one after it."""
MOST_PLACES = 1 << 18
"""Maximum number of places, which bounds memory. A place is a character of a phrase; phrases share places where they
begin alike."""
MIN_TOKENS = 32
"""Number of the grammar's tokens to consider in each frame; the beam size if that is larger."""
_MAX_STATES = 1 << 16
_ROOT = 0


@dataclass(slots=True)
class PhraseState:
    """The state of a hypothesis in the grammar. Equal states may be different objects.

    `places` are the places in phrases that its last characters may have reached. `is_apart`: it ends at a word
    boundary. `accepts`: it may end here, that is, after a complete phrase or before the first one. `moves` caches the
    next state by token; None: the token is not allowed.
    """

    places: frozenset[int]
    is_apart: bool
    accepts: bool
    moves: dict[int, PhraseState | None] = field(default_factory=dict, compare=False)


class PhraseGraph:
    """The automaton of a grammar for a vocabulary. Thread-safe: at worst, two threads compute the same state.

    `start` is the state of an empty hypothesis. `rest` is the id of the token for other words, one above the
    vocabulary's last id; None: other words are not allowed. `vocabulary` includes `rest`. `tokens` are the ids of the
    blank and of all tokens that may be part of a phrase, in ascending order; `word_starts` those that begin a word.
    `num_choices` counts places that follow another by the same character as an earlier one; they cost time in a search.
    `num_places` counts all places.

    Raises GrammarError if the grammar is too large, a slot is undefined or contains itself, or a phrase may be empty or
    has characters that the vocabulary lacks.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, blank: int = 0) -> None:
        self.blank = blank
        self.lines = grammar.lines
        self.rest = len(vocabulary) if grammar.has_rest else None
        symbols = [*vocabulary.symbols, f"{WORD_BOUNDARY}{UNKNOWN}{WORD_BOUNDARY}"] if grammar.has_rest else None
        self.vocabulary = Vocabulary(symbols, vocabulary.config) if symbols else vocabulary
        self._spellings = [with_boundaries(symbol) for symbol in vocabulary.symbols]
        self._slots = grammar.slots
        self._spelling = Spelling(vocabulary)
        self._words: dict[str, tuple[str, ...]] = {}
        self._arcs: list[dict[str, list[int]]] = [{}]
        self._single = {_ROOT}  # places with a single predecessor
        self._ends: set[int] = set()
        self.num_choices, self._num_steps, self._most_steps = 0, 0, grammar.most_steps
        for line, expression in grammar.phrases.items():
            what = f"grammar: phrase {line!r:.80}"
            ends = self._add(expression, frozenset((_ROOT,)), (), what)
            if _ROOT in ends:
                raise GrammarError(f"{what}: can be empty, expected at least one word")
            self._ends |= ends
        self.num_places = len(self._arcs)
        self._states: dict[tuple[frozenset[int], bool, bool], PhraseState] = {}
        root = frozenset((_ROOT,))
        self.start = PhraseState(self._after(root, WORD_BOUNDARY), is_apart=True, accepts=True)
        self._outside = PhraseState(root, is_apart=False, accepts=True)
        words = {word for words in self._words.values() for word in words}
        longest = max(map(len, self._spellings))
        parts = {word[i : i + size] for word in words for i in range(len(word)) for size in range(longest + 1)}
        stripped = (symbol.strip(WORD_BOUNDARY) for symbol in self._spellings)
        self.tokens = np.flatnonzero([token == blank or part in parts for token, part in enumerate(stripped)])
        self.word_starts = np.flatnonzero(np.frombuffer(vocabulary.word_starts, np.uint8))

    def advance(self, state: PhraseState, token: int) -> PhraseState | None:
        """Return the state after `token`; None if the grammar does not allow `token`."""
        if token not in state.moves:
            following: PhraseState | None = state
            if token == self.rest:
                following = self._outside if state.accepts and state is not self._outside else None
            else:
                for character in self._spellings[token]:
                    following = following and self._step(following, character)
            state.moves[token] = following
        return state.moves[token]

    def is_whole(self, state: PhraseState) -> bool:
        """Return whether the last word is complete, whatever token follows."""
        cannot_grow = state.is_apart or all(self._arcs[place].keys() <= {WORD_BOUNDARY} for place in state.places)
        return state.accepts and cannot_grow

    def phrases(self, tokens: Sequence[int], *, is_final: bool = True) -> list[tuple[int, int]]:
        """Return the start and end of each complete phrase. The grammar must allow `tokens`. Prefers longer phrases.

        Without `is_final`, a phrase at the end is left out if it may still become longer.
        """
        num = len(tokens)
        following: dict[int, int | None] = {num: None}  # end of the phrase, by its beginning
        for begin in range(num - 1, -1, -1):
            ends, may_go_on = self._read(tokens, begin)
            if may_go_on and not is_final:
                ends = [end for end in ends if end < num]
            end = next((end for end in reversed(ends) if end in following), None)
            if end is not None or may_go_on:
                following[begin] = end
        found, begin = [], 0
        while (end := following.get(begin)) is not None:
            if not self._is_between(tokens[begin]):
                found.append((begin, end))
            begin = end
        return found

    def _read(self, tokens: Sequence[int], begin: int) -> tuple[list[int], bool]:
        """Return where a phrase that begins at `begin` may end, and whether it may continue after the last token."""
        if self._is_between(tokens[begin]):
            return [begin + 1], False
        places, is_apart, is_complete = self.start.places, True, False
        ends: list[int] = []
        for end, token in enumerate(tokens[begin:], begin + 1):
            for character in "" if token == self.rest else self._spellings[token]:
                if character != WORD_BOUNDARY or not is_apart:
                    is_apart = character == WORD_BOUNDARY
                    places = self._after(places, character)
                    is_complete = bool(places & self._ends) or (is_apart and is_complete)
            if token == self.rest or not (places or is_complete):
                return ends, False
            if is_complete:
                ends.append(end)
        return ends, any(self._arcs[place] for place in places)

    def _is_between(self, token: int) -> bool:
        """Return whether a token is `rest` or a word boundary: these lie between phrases and do not begin one."""
        return token == self.rest or self._spellings[token] == WORD_BOUNDARY

    def _step(self, state: PhraseState, character: str) -> PhraseState | None:
        is_apart = character == WORD_BOUNDARY
        if is_apart and state.is_apart:
            return state
        places = self._after(state.places, character)
        if places & self._ends:
            places |= {_ROOT}
        if len(self._states) >= _MAX_STATES:
            self._states = {}
        accepts = _ROOT in places or (is_apart and state.accepts)
        new = PhraseState(places, is_apart, accepts)
        return self._states.setdefault((places, is_apart, accepts), new) if places else None

    def _after(self, places: Iterable[int], character: str) -> frozenset[int]:
        return frozenset(following for place in places for following in self._arcs[place].get(character, ()))

    def _add(
        self, expression: Expression, places: frozenset[int], within: tuple[str, ...], what: str
    ) -> frozenset[int]:
        """Add an expression at `places`; return its end places. `within`: slots around it, and "" for each bracket."""
        check_nested(len(within), what)
        ends: set[int] = set()
        for alternative in expression:
            reached = places
            for item in alternative:
                self._count(1, what)
                if not isinstance(item, str):
                    reached = self._add(item, reached, (*within, ""), what)
                elif not item.startswith("<"):
                    for word in self._spelled(item, what):
                        reached = self._add_word(word, reached, what)
                elif item in within:
                    raise GrammarError(f"{what}: slot {item} contains itself")
                elif item not in self._slots:
                    expected = f"one of {', '.join(self._slots)}" if self._slots else "none: the grammar defines none"
                    raise GrammarError(f"{what}: found slot {item}, expected {expected}")
                else:
                    reached = self._add(self._slots[item], reached, (*within, item), what)
            ends |= reached
        return frozenset(ends)

    def _add_word(self, word: str, places: frozenset[int], what: str) -> frozenset[int]:
        for character in WORD_BOUNDARY + word:
            self._count(len(places), what)
            arcs = [self._arcs[place].setdefault(character, []) for place in places]
            shared = [each for each in arcs[0] if each in self._single] if len(arcs) == 1 else []
            if not shared:
                shared = [len(self._arcs)]
                self._arcs.append({})
                self._single.update(shared * (len(arcs) == 1))
                for each in arcs:
                    each.append(shared[0])
                    self.num_choices += len(each) > 1
            places = frozenset(shared[:1])
        return places

    def _count(self, number: int, what: str) -> None:
        self._num_steps += number
        if self._num_steps > self._most_steps or len(self._arcs) >= MOST_PLACES:
            raise GrammarError(f"{what}: found {len(self._arcs)} characters, {self._num_steps} steps, expected fewer")

    def _spelled(self, text: str, what: str) -> tuple[str, ...]:
        """Return the words of a text, spelled with the characters of the vocabulary."""
        if text not in self._words:
            try:
                self._words[text], _ = self._spelling.phrase(text, what)
            except ValueError as error:
                raise GrammarError(str(error)) from None
        return self._words[text]
