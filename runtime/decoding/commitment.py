"""Finds the tokens of a beam search that no later frame can change.

These are the tokens shared by all hypotheses that may still become the best. In clear speech, a beam fills with
variants of past words: its hypotheses share hardly any tokens, but most of them are already beaten.

A prefix *beats* another under four conditions. Both have the same last token. Both have the same states of the
language model, hotwords and grammar. The winner's hotword bonus is not smaller than the loser's. With `Prefix.extra`
included, the winner's alignments are more probable than the loser's, separately for those that end in blank and for the
rest. Later frames add the same to both prefixes, so the winner stays ahead, and stays in the beam as long as the loser
does.

A shorter prefix of the loser that is also in the beam passes alignments on to the loser. Therefore, the winner must
end in the same tokens that the loser adds to that prefix. Without these tokens, the winner must also beat that prefix
in the same way. A beaten hypothesis will never be the best, so the tokens shared by all others are settled.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

from u2moe.runtime.decoding.beam_search import Beam, BeamSearch, Prefix

_ROUNDING = 1e-6  # margin by which the winner must be better, far larger than accumulated rounding errors


class Commitment:
    """The committed tokens of a beam search, up to the prefix `last`. Every later best hypothesis begins with these."""

    def __init__(self, search: BeamSearch) -> None:
        self._search = search
        self.last = search.beams[0].prefix

    def holds_for(self, prefix: Prefix) -> bool:
        """Return whether a prefix of this search begins with the committed tokens."""
        return prefix.ancestor(self.last.depth) is self.last

    def extend(self, tokens: Sequence[int]) -> None:
        """Commit further settled tokens."""
        self.last = self._search.extension(self.last, tokens) or self.last

    def next_peak(self) -> float:
        """Return the earliest frame at which a token after the committed ones peaks; infinity if there is none."""
        live = (beam for beam in self._search.beams if self.holds_for(beam.prefix))
        return min((beam.earliest_peak(self.last.depth) for beam in live), default=math.inf)

    def num_settled(self, tokens: Sequence[int], word_starts: bytes) -> float:
        """Return how many of `tokens`, after the committed ones, are settled; 0.5 more if a word surely begins next."""
        live = sorted(self._shared(tokens, word_starts), key=itemgetter(0))
        beams = {beam.prefix: beam for beam in self._search.beams}
        least_depth = min(prefix.depth for prefix in beams)
        settled: float = len(tokens)
        for own, beam in live:
            if own >= settled:
                break
            # The beams of this prefix and its ancestors, shortest first. Some ancestors have no beam.
            line: list[Beam] = []
            node: Prefix | None = beam.prefix
            while node is not None and node.depth >= least_depth:
                line += [beams[node]] if node in beams else []
                node = node.parent
            line.reverse()
            first, most = line[0].prefix, own
            for theirs, rival in live:
                if theirs > most and _future(rival.prefix) == _future(first) and self._beats(rival, line, beams):
                    most = theirs
            settled = min(settled, most)
        return settled

    def _shared(self, tokens: Sequence[int], word_starts: bytes) -> Iterator[tuple[float, Beam]]:
        """For hypotheses that begin with the committed tokens, yield how many of `tokens` follow, and their beams."""
        # The number ends in .5 if the next tokens differ, but both begin a word.
        base, node = self.last.depth, self.last
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

    def _beats(self, rival: Beam, line: Sequence[Beam], beams: Mapping[Prefix, Beam]) -> bool:
        """Return whether `rival` beats every beam of `line`, which begins with the shortest."""
        # For each longer beam, `rival` is first extended by the tokens that this beam adds to the one before it.
        better: Prefix | None = rival.prefix
        depth = line[0].prefix.depth
        for beam in line:
            better = better and self._search.extension(better, beam.prefix.tokens(depth))
            ours = None if better is None else beams.get(better)
            if ours is None or ours.prefix.bonus < beam.prefix.bonus:
                return False
            ahead = ours.prefix.extra - beam.prefix.extra - _ROUNDING
            if not (ours.blank + ahead >= beam.blank and ours.token + ahead >= beam.token):
                return False
            depth = beam.prefix.depth
        return True


def _future(prefix: Prefix) -> tuple[object, ...]:
    """Return everything that the scores of further tokens depend on."""
    return prefix.token, prefix.state, prefix.language, prefix.phrase
