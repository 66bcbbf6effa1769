"""Shallow fusion: language model scores for hypotheses that grow token by token, with look-ahead inside words.

A word is scored when it ends. Until then, the score of its best completion counts, which is an upper bound on the final
score. Scores never rise, except by the word bonus, which is added when a word begins. The search uses this to prune.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.language.ngrams import LN10, Ngrams
from u2moe.runtime.text.vocabulary import UNREADABLE, WORD_BOUNDARY, Vocabulary, is_special, with_boundaries

_LAST = "\U0010ffff"
_MAX_STATES = 1 << 17
_SLACK = 1e-9  # tolerance, larger than the rounding errors of sums of scores
_NO_MOVES: dict[int, tuple[FusionState, float]] = {}  # shared by states without cached moves. Never modified


@dataclass(slots=True)
class FusionState:
    """Everything that the scores of further tokens depend on: the history and the prefix of the current word.

    `history` is the model's node for the history before the current word, `begun` the letters of that word so far, and
    `open` the score of its best completion; "" and 0 between words. Caches: `moves` maps a token to the next state and
    the score of the words that it ends. `ended` is the score of the word if it ends here, and the next history.
    """

    history: int
    begun: str
    open: float = field(compare=False)
    moves: dict[int, tuple[FusionState, float]] = field(default_factory=lambda: _NO_MOVES, compare=False)
    ended: tuple[float, int] | None = field(default=None, compare=False)
    losses: tuple[float, float, float] | None = field(default=None, compare=False)


class Fusion:
    """Scores the tokens of a vocabulary with a language model.

    Caches a limited number of states. Thread-safe: at worst, two threads compute the same state.

    Attributes:
        start: state of an empty hypothesis.
        gains: by token, an upper bound on what it adds to the score, namely the bonus of the words that it may begin.
        most_gain: the largest of `gains`.
        ends_word: by token, whether it ends the preceding word.
        rescoring_weight: factor of the score in the second pass.
        ngrams: the model, with its words sorted by their spelling in the vocabulary.
        symbols: symbols of the vocabulary.
        numbers: weight, word bonus, score of unknown words, and rescoring weight.
        is_by_token: whether the model predicts tokens instead of words.
        classes: words by class.
    """

    def __init__(self, options: LanguageModelOptions, vocabulary: Vocabulary) -> None:
        # Keep no reference to the options: they are weak keys of the recogniser's cache.
        self._scale, self._word_bonus = options.weight * LN10, options.word_bonus
        self._unknown_score, self.rescoring_weight = options.unknown_score / LN10, options.rescoring_weight
        self.numbers = (options.weight, options.word_bonus, options.unknown_score, options.rescoring_weight)
        self.symbols = vocabulary.symbols
        spell = vocabulary.convert_case
        self.ngrams, self._spelled = _sorted_words(options.model.ngrams, spell)
        words = self.ngrams.words
        self._classes: dict[str, list[tuple[int, float]]] = {}
        self.classes = {name: tuple(options.classes[name]) for name in sorted(options.classes)}
        for name, listed in self.classes.items():
            share = (words.index(name), -math.log10(len(listed)))
            for entry in listed:
                self._classes.setdefault(spell(entry), []).append(share)
        self._listed = sorted(self._classes)
        self.is_by_token = (options.level or options.model.level) == "token"
        ids = {word: number for number, word in enumerate(words)}
        self._by_token = [ids.get(symbol) for symbol in vocabulary.symbols] if self.is_by_token else []
        self._spellings = [with_boundaries(symbol) for symbol in vocabulary.symbols]
        self._bonus = bonus = max(options.word_bonus, 0.0)
        self.ends_word = [not self._by_token and text.startswith(WORD_BOUNDARY) for text in self._spellings]
        # The most words that can begin in each token, whatever precedes it.
        num_starts = [1 if self._by_token else sum(map(bool, text.split(WORD_BOUNDARY))) for text in self._spellings]
        self.gains = [bonus * num + _SLACK for num in num_starts]
        self._most_gains = [
            max((gain for gain, end in zip(self.gains, self.ends_word, strict=True) if end is ends), default=-math.inf)
            for ends in (False, True)
        ]
        self.most_gain = max(self.gains)
        self._states: dict[tuple[int, str], FusionState] = {}
        self._beginnings: dict[str, _Beginning | None] = {}
        self._unknowns: dict[int, tuple[float, int]] = {}
        self.start = FusionState(self.ngrams.begin, "", 0.0)

    def check_words(self, source: str) -> None:
        """Raise LanguageModelError, beginning with `source`, unless the vocabulary can spell a word of the model."""
        letters = set("".join(self._spellings))
        names = self.ngrams.words
        tokens = [word is not None and not is_special(names[word]) for word in self._by_token]
        if not any(tokens or map(letters.issuperset, self._spelled)):
            expected = "tokens of the vocabulary" if self._by_token else "words that the vocabulary can spell"
            raise LanguageModelError(f"{source}: found words such as {names[:3]}, expected {expected}")

    def advance(self, state: FusionState, token: int) -> tuple[FusionState, float]:
        """Return the state after `token`, and the score of the words that it ends."""
        move = state.moves.get(token)
        if move is None:
            if self._by_token:
                word = self._by_token[token]
                score, history = self._unknown(state.history) if word is None else self.ngrams.step(state.history, word)
                move = self._state(history, ""), self._scale * score + self._word_bonus
            else:
                move = self._read(state, self._spellings[token])
            if state.moves is _NO_MOVES:  # most states share it
                state.moves = {}
            state.moves[token] = move
        return move

    def finish(self, state: FusionState) -> float:
        """Return the summed score of the last word and the sentence end, for a hypothesis that ends in `state`."""
        state, score = self._read(state, WORD_BOUNDARY)
        if self.ngrams.end is not None:
            score += self._scale * self.ngrams.step(state.history, self.ngrams.end)[0]
        return score

    def end_probability(self, tokens: Sequence[int]) -> float:
        """Return the probability that a sentence ends after these tokens; 0 if the model has no sentence ends."""
        state = self.start
        for token in tokens:
            state, _ = self.advance(state, token)
        state, _ = self._read(state, WORD_BOUNDARY)
        return 0.0 if self.ngrams.end is None else math.pow(10, self.ngrams.step(state.history, self.ngrams.end)[0])

    def score(self, tokens: Sequence[int]) -> float:
        """Return the score of a finished hypothesis; 0 for an empty one."""
        state, total = self.start, 0.0
        for token in tokens:
            state, score = self.advance(state, token)
            total += score
        return total + self.finish(state) if tokens else 0.0

    def _read(self, state: FusionState, characters: str) -> tuple[FusionState, float]:
        history, begun, score = state.history, state.begun, 0.0
        for character in characters:
            if character != WORD_BOUNDARY:
                begun += character
            elif begun:
                word_score, history = self._ended(state) if begun is state.begun else self._word(history, begun)
                score += word_score
                begun = ""
        return self._state(history, begun), score

    def losses(self, state: FusionState | None) -> tuple[float, float, float]:
        """Return upper bounds on what the next token adds to the score.

        The first is for tokens that continue the current word. The second is for tokens that end it (`ends_word`): the
        score of the word then replaces that of its best completion. Both are at most 0, and the token's entry in
        `gains` must be added to them. The third is for any token, and includes `gains`.
        """
        if state is None:
            return 0.0, 0.0, self.most_gain
        if state.losses is None:
            continues, ends = (-self._bonus, self._ended(state)[0] - state.open) if state.begun else (0.0, 0.0)
            state.losses = continues, ends, max(continues + self._most_gains[0], ends + self._most_gains[1])
        return state.losses

    def _ended(self, state: FusionState) -> tuple[float, int]:
        """Return the score of the current word and the history after it, if the word ends here."""
        if state.ended is None:
            state.ended = self._word(state.history, state.begun)
        return state.ended

    def _state(self, history: int, begun: str) -> FusionState:
        beginning = self._beginning(begun) if begun else None
        if begun and beginning is None:
            begun = UNREADABLE  # no word has this prefix
        state = self._states.get((history, begun))
        if state is None:
            if len(self._states) >= _MAX_STATES:
                states, self._states = self._states, {}
                for old in states.values():  # states in use stay valid, but keep no others alive
                    old.moves = _NO_MOVES
                self.start.moves = _NO_MOVES
            state = FusionState(history, begun, self._open(history, beginning) if begun else 0.0)
            self._states[history, begun] = state
        return state

    def _open(self, history: int, beginning: _Beginning | None) -> float:
        """Return an upper bound on the score of any word with this prefix."""
        best, _ = self._unknown(history)
        if beginning is not None:
            if beginning.low < beginning.high:
                best = max(best, self.ngrams.best(history, beginning.low, beginning.high, beginning.best_alone))
            for word, share in beginning.members:
                best = max(best, self.ngrams.step(history, word)[0] + share)
        return self._scale * best + self._word_bonus

    def _word(self, history: int, spelled: str) -> tuple[float, int]:
        """Return the score of the most probable word with this spelling, and the next history."""
        beginning = self._beginning(spelled)
        if beginning is None or not beginning.words:
            score, after = self._unknown(history)
            return self._scale * score + self._word_bonus, after
        best, following = -math.inf, 0
        for word, share in beginning.words:
            score, after = self.ngrams.step(history, word)
            if score + share > best:
                best, following = score + share, after
        return self._scale * best + self._word_bonus, following

    def _unknown(self, history: int) -> tuple[float, int]:
        """Return the log10 probability of an out-of-vocabulary word, and the next history."""
        found = self._unknowns.get(history)
        if found is None:
            score, after = 0.0, 0
            if self.ngrams.unknown is not None:
                score, after = self.ngrams.step(history, self.ngrams.unknown)
            found = score + self._unknown_score, after
            if len(self._unknowns) >= _MAX_STATES:
                self._unknowns.clear()
            self._unknowns[history] = found
        return found

    def _beginning(self, begun: str) -> _Beginning | None:
        """Return the words with this prefix, from the model and from classes; None: there are none."""
        with contextlib.suppress(KeyError):
            return self._beginnings[begun]
        low, high = bisect_left(self._spelled, begun), bisect_left(self._spelled, begun + _LAST)
        listed = self._listed[bisect_left(self._listed, begun) : bisect_left(self._listed, begun + _LAST)]
        found = None
        if low < high or listed:
            alone = float(self.ngrams.log_prob[1 + low : 1 + high].max()) if low < high else 0.0
            whole = bisect_right(self._spelled, begun, low, high)
            words = [*((word, 0.0) for word in range(low, whole)), *self._classes.get(begun, ())]
            found = _Beginning(low, high, alone, words, [share for entry in listed for share in self._classes[entry]])
        if len(self._beginnings) >= _MAX_STATES:
            self._beginnings.clear()
        self._beginnings[begun] = found
        return found


class _Beginning(NamedTuple):
    """The words with a common prefix: the model's words from `low` to `high` (exclusive), and `members` of classes.

    `best_alone` is the largest unigram log-probability of the former. `words` equal the prefix. Words are pairs of an
    id, that of the word itself or of a class that contains it, and log10 of the word's share of the class, or 0.
    """

    low: int
    high: int
    best_alone: float
    words: list[tuple[int, float]]
    members: list[tuple[int, float]]


def _sorted_words(ngrams: Ngrams, spell: Callable[[str], str]) -> tuple[Ngrams, list[str]]:
    """Return the model with its words sorted by their spelling in the vocabulary, and these spellings."""
    are_special = list(map(is_special, ngrams.words))
    num_spelled = are_special.count(False)
    spelled = [spell(word) for word in ngrams.words[:num_spelled]]
    if spelled != sorted(spelled) or any(are_special[:num_spelled]):
        ngrams = Ngrams.of(ngrams.words, [ngrams.rows(length + 1) for length in range(ngrams.order)], spell=spell)
        spelled = [spell(word) for word in ngrams.words[:num_spelled]]
    return ngrams, spelled
