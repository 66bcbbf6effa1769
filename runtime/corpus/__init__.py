"""Corpora: lists, runs over them by many processes and machines, their results, and word errors.

`ray` and `parquet` need their extras, and are imported by their names.
"""

from u2moe.runtime.corpus.blocks import Shard
from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.lists import ListOptions, read_utterances
from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.corpus.results import merge, read_outcomes
from u2moe.runtime.corpus.rows import Outcome
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.corpus.runner import CorpusOptions, RunProgress, run_corpus
from u2moe.runtime.corpus.score import GroupScore, Score, score

__all__ = [
    "CorpusOptions",
    "Entry",
    "GroupScore",
    "ListOptions",
    "ModelChoice",
    "Outcome",
    "OutputFolder",
    "RunProgress",
    "Score",
    "Shard",
    "merge",
    "read_outcomes",
    "read_utterances",
    "run_corpus",
    "score",
]
