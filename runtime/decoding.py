"""How to decode: options, checked at birth. What they mean is in `ctc`, `rescore` and `encoder`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from u2moe.runtime.endpoint import EndpointConfig

Search = Literal["attention_rescoring", "ctc_prefix_beam", "ctc_greedy", "attention"]
SEARCHES: tuple[Search, ...] = get_args(Search)

STREAM_CHUNK_SIZE = 16
"""Encoder frames per chunk of a stream that names none: 640 ms where an encoder frame is 40 ms."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How a recogniser decodes.

    Attributes:
        search: `attention_rescoring`: prefix beam search, then the decoder chooses among its n best; `ctc_prefix_beam`
            and `ctc_greedy`: one pass; `attention`: the decoder searches alone once the utterance has ended (no times;
            partial results come from greedy search). None: rescoring where the model has a decoder, else prefix beam.
        beam_size: prefixes kept by a beam search, and length of the n-best list.
        ctc_weight: weight of the first pass when rescoring; None: as trained (in the bundle).
        reverse_weight: share of the right-to-left decoder when rescoring, 0 to 1; None: as trained (in the bundle).
        length_penalty: exponent of the length that scores of `attention` are divided by.
        chunk_size: encoder frames per chunk. None: full context in `transcribe`; in a stream the chunk size that the
            encoder was trained for, or 16 where it was trained for any.
        num_left_chunks: chunks of left context; -1: all. A stream of unbounded left context grows slower and larger as
            it goes on, so bound it where utterances may last for minutes, or let them end by `endpoint`.
        endpoint: rules by which utterances end, and the next segment begins. None: a stream is one utterance, and
            `transcribe` takes the default rules.
    """

    search: Search | None = None
    beam_size: int = 10
    ctc_weight: float | None = None
    reverse_weight: float | None = None
    length_penalty: float = 0.0
    chunk_size: int | None = None
    num_left_chunks: int = -1
    endpoint: EndpointConfig | None = None

    def __post_init__(self) -> None:
        if self.search is not None and self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}")
        if self.beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {self.beam_size}")
        if self.ctc_weight is not None and not 0 <= self.ctc_weight < math.inf:
            raise ValueError(f"ctc_weight must be at least 0, got {self.ctc_weight}")
        if self.reverse_weight is not None and not 0 <= self.reverse_weight <= 1:
            raise ValueError(f"reverse_weight must be between 0 and 1, got {self.reverse_weight}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a number, got {self.length_penalty}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.num_left_chunks < -1:
            raise ValueError(f"num_left_chunks must be at least 0, or -1 for all, got {self.num_left_chunks}")
