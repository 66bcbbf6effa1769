"""Corpora: lists of recordings, recognition in many processes or on many machines, results, and word errors.

Import `ray` and `parquet` explicitly, because they need extras.
"""

from u2moe.runtime.corpus.entry import Entry, Shard
from u2moe.runtime.corpus.lists import ListOptions, read_utterances
from u2moe.runtime.corpus.recognition import ModelChoice
from u2moe.runtime.corpus.results import GroupScore, Score, merge, read_outcomes, score
from u2moe.runtime.corpus.rows import Outcome
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.corpus.runner import CorpusOptions, RunProgress, run_corpus

__all__ = [
    "CorpusOptions", "Entry", "GroupScore", "ListOptions", "ModelChoice", "Outcome", "OutputFolder", "RunProgress",
    "Score", "Shard", "merge", "read_outcomes", "read_utterances", "run_corpus", "score",
]  # fmt: skip
