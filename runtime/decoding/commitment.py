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
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

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
        live = sorted(self._shared(tokens, word_starts), key=itemgetter(0))
        beams = {beam.prefix: beam for beam in self._search.beams}
        least_depth = min(prefix.depth for prefix in beams)
        settled: float = len(tokens)
        for own, beam in live:
            if own >= settled:
                break
            line = list(_line(beam.prefix, beams, least_depth))[::-1]
            first, most = line[0].prefix, own
            for theirs, rival in live:
                if theirs > most and _have_same_future(rival.prefix, first) and self._beats(rival, line, beams):
                    most = theirs
            settled = min(settled, most)
        return settled

    def _shared(self, tokens: Sequence[int], word_starts: bytes) -> Iterator[tuple[float, Beam]]:
        """How many of these tokens, see `num_settled`, each hypothesis has that begins with the committed ones."""
        base, node = self._last.depth, self._last
        numbers = {node: 0}
        for number, token in enumerate(tokens, start=1):
            longer = self._search.extension(node, (token,))
            if longer is None:
                break
            numbers[longer], node = number, longer
        for beam in self._search.beams:
            node, following = beam.prefix, -1
            while node not in numbers and node.parent is not None and node.depth > base:
                following, node = node.token, node.parent
            if node in numbers:
                number = numbers[node]
                differs = following >= 0 and number < len(tokens)
                yield number + 0.5 * (differs and word_starts[tokens[number]] and word_starts[following]), beam

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


def _line(prefix: Prefix, beams: Mapping[Prefix, Beam], least_depth: int) -> Iterator[Beam]:
    """The beams of a prefix and of the prefixes with which it begins, the longest first."""
    node: Prefix | None = prefix
    while node is not None and node.depth >= least_depth:
        if node in beams:
            yield beams[node]
        node = node.parent


def _have_same_future(one: Prefix, other: Prefix) -> bool:
    """Whether the scores of further tokens are the same after both."""
    mine, theirs = one.language, other.language
    if one.token != other.token or one.state != other.state or one.phrase is not other.phrase:
        return False
    return mine is theirs or bool(mine and theirs and (mine.history, mine.begun) == (theirs.history, theirs.begun))


def _is_better(beam: Beam, other: Beam) -> bool:
    ahead = beam.prefix.extra - other.prefix.extra - _ROUNDING
    is_probable = beam.blank + ahead >= other.blank and beam.token + ahead >= other.token
    return is_probable and beam.prefix.bonus >= other.prefix.bonus
