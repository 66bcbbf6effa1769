"""What later frames cannot change: the tokens with which each hypothesis begins that may still become the best.

In clear speech a beam fills with variants of words long past: its hypotheses have hardly a token in common, but most of
them are already beaten. One prefix *beats* another if both have the same last token and the same states of language
model and hotwords, and if its alignments are more probable, those that end in blank and those that do not, with what
the search adds for the prefix. Whatever follows adds the same to both: the first stays ahead, and in the beam, as long
as the other is there. If the beam also has a prefix with which the beaten one begins, that passes on alignments: it has
to be beaten in the same way, by the prefix that lacks the same last tokens. So a hypothesis will never be the best once
it is beaten, and all hypotheses that are not beaten begin with the tokens that are settled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from u2moe.runtime.decoding.beam_search import Beam, BeamSearch, Prefix

_ROUNDING = 1e-6
"""How much better the winner must be: far more than rounding errors add up to."""


class Commitment:
    """The committed tokens of a beam search, with which its best hypothesis begins from now on."""

    def __init__(self, search: BeamSearch) -> None:
        self._search = search
        self._last = search.beams[0].prefix

    @property
    def num_tokens(self) -> int:
        """Number of committed tokens."""
        return self._last.depth

    def holds_for(self, prefix: Prefix) -> bool:
        """Whether a prefix of this search begins with the committed tokens."""
        return prefix.ancestor(self._last.depth) is self._last

    def extend(self, tokens: Sequence[int]) -> None:
        """Commit further tokens, of those that are settled."""
        self._last = self._search.extension(self._last, tokens) or self._last

    def next_peak(self) -> float:
        """The earliest frame at which any token peaks that may follow the committed ones; infinite without any."""
        return min((beam.earliest_peak(self.num_tokens) for beam in self._live()), default=math.inf)

    def num_settled(self, tokens: Sequence[int], word_starts: bytes) -> float:
        """How many of the tokens that follow the committed ones in the best hypothesis can be committed, too.

        And a half if a word begins after them, whichever token follows.
        """
        shared: dict[Prefix, float] = {}
        alike: defaultdict[object, list[Beam]] = defaultdict(list)
        for beam in self._live():
            shared[beam.prefix] = _num_shared(tokens, beam.prefix.tokens(self.num_tokens), word_starts)
            alike[_future(beam.prefix)].append(beam)
        beams = {beam.prefix: beam for beam in self._search.beams}
        least_depth = min(prefix.depth for prefix in beams)
        settled: float = len(tokens)
        for prefix, own in shared.items():
            if own < settled:
                line = list(_line(prefix, beams, least_depth))[::-1]
                rivals = (rival for rival in alike[_future(line[0].prefix)] if shared[rival.prefix] > own)
                beaten = [shared[rival.prefix] for rival in rivals if self._beats(rival, line, beams)]
                settled = min(settled, max(beaten, default=own))
        return settled

    def _live(self) -> list[Beam]:
        return [beam for beam in self._search.beams if self.holds_for(beam.prefix)]

    def _beats(self, rival: Beam, line: Sequence[Beam], beams: Mapping[Prefix, Beam]) -> bool:
        """Whether a beam beats the first of some prefixes, each an extension of the one before, and so on."""
        better: Prefix | None = rival.prefix
        depth = line[0].prefix.depth
        for beam in line:
            better = better and self._search.extension(better, beam.prefix.tokens(depth))
            ours = None if better is None else beams.get(better)
            if ours is None or not _is_better(ours, beam):
                return False
            depth = beam.prefix.depth
        return True


def _num_shared(tokens: Sequence[int], others: Sequence[int], word_starts: bytes) -> float:
    pairs = enumerate(zip(tokens, others, strict=False))
    num = next((place for place, (token, other) in pairs if token != other), min(len(tokens), len(others)))
    following = [*tokens[num : num + 1], *others[num : num + 1]]
    return num + 0.5 * (len(following) == 2 and all(word_starts[token] for token in following))


def _line(prefix: Prefix, beams: Mapping[Prefix, Beam], least_depth: int) -> Iterator[Beam]:
    """The beams of a prefix and of the prefixes with which it begins, the longest first."""
    node: Prefix | None = prefix
    while node is not None and node.depth >= least_depth:
        if node in beams:
            yield beams[node]
        node = node.parent


def _future(prefix: Prefix) -> object:
    """All on which the scores of further tokens depend."""
    language = prefix.language
    return prefix.token, prefix.state, language and (language.history, language.begun)


def _is_better(beam: Beam, other: Beam) -> bool:
    ahead = beam.prefix.extra - other.prefix.extra - _ROUNDING
    is_probable = beam.blank + ahead >= other.blank and beam.token + ahead >= other.token
    return is_probable and beam.prefix.bonus >= other.prefix.bonus
