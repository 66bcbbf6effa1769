"""Lists of utterances as people have them: one file for each format, and the table of them."""

from u2moe.runtime.corpus.manifests.options import ManifestOptions
from u2moe.runtime.corpus.manifests.table import (
    FORMATS,
    ManifestFormat,
    count_lines,
    digest,
    find_format,
    read_utterances,
)

__all__ = ["FORMATS", "ManifestFormat", "ManifestOptions", "count_lines", "digest", "find_format", "read_utterances"]
