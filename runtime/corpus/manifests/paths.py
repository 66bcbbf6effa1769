"""A list of paths, one for each line, each perhaps with a transcript after a tab."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry
from u2moe.runtime.corpus.manifests.lines import parse_lines
from u2moe.runtime.corpus.manifests.options import ManifestOptions


def read(manifest: str, options: ManifestOptions) -> Iterator[Entry]:
    """Utterances of a list of paths; the path as written is the key."""

    def parse(line: str) -> Entry:
        path, tab, transcript = line.partition("\t")
        path = path.strip()
        return Entry(key=path, source=options.source(path, manifest), text=transcript.strip() if tab else None)

    return parse_lines(manifest, parse)
