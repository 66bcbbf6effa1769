"""Hotwords: phrases that a search prefers, as an Aho-Corasick automaton over text.

The automaton reads characters; a token advances it by the characters of its symbol. It therefore finds a phrase in any
tokenization (▁CAT, ▁C AT or ▁ C A T). This matters because a bundle does not state how its training text was
tokenized. The bonus depends only on the text. Transitions are cached by state and token, so a search needs one look-up
per token.

Text and phrases are words with boundaries on both sides ("▁NEW▁YORK▁"), so CAT is not found in CATS or BOBCAT. In
scripts without spaces, and in Korean, whose words have endings, each character counts as a word.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from u2moe.runtime.text.vocabulary import WORD_BOUNDARY, Spelling, Vocabulary, is_syllabic, with_boundaries
from u2moe.runtime.validation import checked_number, wrong

Hotwords = Iterable[str | tuple[str, float]] | Mapping[str, float]
"""Phrases with or without weights, or a mapping from phrases to weights."""

DEFAULT_WEIGHT = 1.5
"""Weight of a hotword that is given without one: a log-probability per token."""
MOST_WEIGHT = 100.0
"""Largest weight. A token of a phrase with this weight beats any other token."""
LONGEST_PHRASE = 200
"""Longest phrase in characters, which bounds memory and time."""

_MAX_MOVES = 1 << 18
_ROUNDING = 1e-6  # tolerance, far larger than rounding errors of sums


class ContextGraph:
    """The bonus that hotwords add to the score of a hypothesis.

    A finished hypothesis earns the bonus of a phrase for every occurrence in its words, and nothing for incomplete
    phrases. A growing hypothesis also has a `partial` bonus for an incomplete phrase at its end. This bonus is a share
    of the phrase's bonus, in proportion to the characters matched so far, and is lost if the match fails.

    The bonus of a phrase is its weight times the number of tokens in its shortest tokenization. Weights are therefore
    comparable with WeNet's context score and sherpa-onnx's hotwords score.

    Attributes:
        start: state of an empty hypothesis.
        hotwords: the phrases and their weights.
        symbols: symbols of the vocabulary.
        most_gain: upper bound on what a token adds to the bonus of a growing hypothesis, including `partial`.

    Args:
        hotwords: phrases, with or without weights. A weight is above 0 and at most 100. If a phrase occurs twice, the
            larger weight counts.
        vocabulary: vocabulary of the model.

    Raises:
        ValueError: `hotwords` is empty, a hotword is empty or too long, a weight is out of range, or the vocabulary
            cannot spell a hotword, even with its letter case adapted.
    """

    def __init__(self, hotwords: Hotwords, vocabulary: Vocabulary) -> None:
        self.hotwords = tuple(_weighted(hotwords))
        self.symbols = vocabulary.symbols
        self._spellings = [with_boundaries(symbol, is_syllabic) for symbol in vocabulary.symbols]
        self._next: list[dict[str, int]] = [{}]
        self._output, self._partial = [0.0], [0.0]
        spelling, bonuses = Spelling(vocabulary), dict[tuple[str, ...], float]()
        for phrase, weight in self.hotwords:
            words, num_tokens = _spelled(phrase, spelling)
            bonuses[words] = max(bonuses.get(words, 0.0), weight * num_tokens)
        if not bonuses:
            raise ValueError("hotwords are empty: pass None to use no hotwords")
        for words, bonus in bonuses.items():
            num_characters, state, matched = sum(map(len, words)), 0, 0
            for character in WORD_BOUNDARY + WORD_BOUNDARY.join(words):
                state = self._grow(state, character)
                matched += character != WORD_BOUNDARY
                self._partial[state] = max(self._partial[state], bonus * matched / num_characters)
            self._output[self._grow(state, WORD_BOUNDARY)] = bonus
        self._fail = self._link()
        arcs_of = ((state, following) for state, arcs in enumerate(self._next) for following in arcs.values())
        step = max(self._output[after] + self._partial[after] - self._partial[state] for state, after in arcs_of)
        self.most_gain = step * max(map(len, self._spellings)) + _ROUNDING
        self.start = self._next[0][WORD_BOUNDARY]
        # All phrases begin with a boundary. These are therefore exactly the states whose last character was a boundary.
        self._after_boundary = {arcs[WORD_BOUNDARY] for arcs in self._next if WORD_BOUNDARY in arcs}
        self._moves: dict[tuple[int, int], tuple[int, float]] = {}

    def advance(self, state: int, token: int) -> tuple[int, float]:
        """Return the state after `token`, and the bonus of the phrases that `token` completes."""
        move = self._moves.get((state, token))
        if move is None:
            move = self._read(state, self._spellings[token])
            if len(self._moves) >= _MAX_MOVES:
                self._moves.clear()
            self._moves[state, token] = move
        return move

    def partial(self, state: int) -> float:
        """Return the bonus that an incomplete phrase has earned so far in `state`. It is lost if the match fails."""
        return self._partial[state]

    def finish(self, state: int) -> float:
        """Return the bonus of the phrases that a hypothesis completes by ending in `state`."""
        return self._read(state, WORD_BOUNDARY)[1]

    def score(self, tokens: Sequence[int]) -> float:
        """Return the bonus of a finished hypothesis."""
        state, total = self.start, 0.0
        for token in tokens:
            state, bonus = self.advance(state, token)
            total += bonus
        return total + self.finish(state)

    def _read(self, state: int, characters: str) -> tuple[int, float]:
        bonus = 0.0
        for character in characters:
            if character == WORD_BOUNDARY and state in self._after_boundary:
                continue
            while state and character not in self._next[state]:
                state = self._fail[state]
            state = self._next[state].get(character, 0)
            bonus += self._output[state]
        return state, bonus

    def _grow(self, state: int, character: str) -> int:
        if character not in self._next[state]:
            self._next[state][character] = len(self._next)
            self._next.append({})
            self._output.append(0.0)
            self._partial.append(0.0)
        return self._next[state][character]

    def _link(self) -> list[int]:
        """Compute failure links: for each state, the longest proper suffix that begins a phrase."""
        # Each state also gets its suffixes' completed bonuses. Its partial bonus is raised to the largest of theirs.
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._output[state] += self._output[fail[state]]
            self._partial[state] = max(self._partial[state], self._partial[fail[state]])
            for character, following in self._next[state].items():
                suffix = fail[state]
                while suffix and character not in self._next[suffix]:
                    suffix = fail[suffix]
                fail[following] = self._next[suffix].get(character, 0)
                queue.append(following)
        return fail


def writable(phrases: Iterable[str], vocabulary: Vocabulary) -> list[str]:
    """Return the phrases that are not too long and can be written with the tokens of a vocabulary."""
    spelling, found = Spelling(vocabulary), []
    for phrase in phrases:
        with contextlib.suppress(ValueError):
            if len(phrase) <= LONGEST_PHRASE and _spelled(phrase, spelling):
                found.append(phrase)
    return found


def parse_hotwords(content: str) -> list[str | tuple[str, float]]:
    """Parse lines "phrase" or "phrase :weight", as in sherpa-onnx; skip comments ("# ...") and empty lines.

    Raises:
        ValueError: a weight is not a number; the message names the line.
    """
    hotwords: list[str | tuple[str, float]] = []
    for number, line in enumerate(content.removeprefix("\ufeff").splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        phrase, separator, weight = stripped.rpartition(" :")
        try:
            hotwords.append((phrase.strip(), float(weight)) if separator else stripped)
        except ValueError:
            raise ValueError(f"hotwords line {number}: weight must be a number, got {weight!r}") from None
    return hotwords


def _weighted(hotwords: Hotwords) -> Iterator[tuple[str, float]]:
    """Yield phrases with their validated weights."""
    if isinstance(hotwords, str | bytes) or not isinstance(hotwords, Iterable):
        raise wrong("hotwords", "a list of phrases, or a mapping from phrases to weights", hotwords)
    for hotword in hotwords.items() if isinstance(hotwords, Mapping) else hotwords:
        phrase, weight = hotword if isinstance(hotword, tuple) and len(hotword) == 2 else (hotword, DEFAULT_WEIGHT)
        if not isinstance(phrase, str):
            raise ValueError(f"a hotword must be a phrase, or a phrase and its weight, got {hotword!r}")  # noqa: TRY004
        if len(phrase) > LONGEST_PHRASE:
            shown = f"hotword {phrase[:LONGEST_PHRASE]!r}..."
            raise ValueError(f"{shown}: must have at most {LONGEST_PHRASE} characters, got {len(phrase)}")
        yield phrase, checked_number(f"hotword {phrase!r}: weight", weight, above=0, most=MOST_WEIGHT)


def _spelled(phrase: str, spelling: Spelling) -> tuple[tuple[str, ...], int]:
    """Return the words of a phrase in the letter case of the vocabulary, and the number of their tokens."""
    words, num_tokens = spelling.phrase(phrase, f"hotword {phrase!r}", is_syllabic)
    if not words:
        raise ValueError(f"hotword {phrase!r} is empty")
    return words, num_tokens
