"""Which model to use and how to decode, as data that other processes can load it by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.recognizer import Recognizer

_CPU = "CPUExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A bundle and how to decode.

    Attributes:
        directory: folder of the bundle; None: the demo model.
        providers: execution providers; None: the CPU.
        num_threads: threads within one operator; None: 1.
        kernels: what computes the functions of the graphs; see `Recognizer.from_pretrained`.
        options: how to decode.
        hotwords: phrases to prefer, with or without weights.
    """

    directory: str | None = None
    providers: tuple[str, ...] | None = None
    num_threads: int | None = None
    kernels: str | None = None
    options: DecodingOptions = field(default_factory=DecodingOptions)
    hotwords: tuple[str | tuple[str, float], ...] | None = None

    def load(self) -> Recognizer:
        """A recogniser; see `Recognizer.from_pretrained` for errors."""
        return Recognizer.from_pretrained(
            self.directory,
            providers=self.providers,
            num_threads=self.num_threads,
            kernels=self.kernels,
            options=self.options,
            hotwords=list(self.hotwords) if self.hotwords is not None else None,
        )

    @property
    def can_be_forked(self) -> bool:
        """Whether processes that are forked after loading can use it: on the CPU, without threads of onnxruntime's."""
        return (self.providers or (_CPU,)) == (_CPU,) and (self.num_threads or 1) == 1

    @property
    def hotwords_digest(self) -> str | None:
        """SHA-256 of the hotwords; None without."""
        return None if self.hotwords is None else hashlib.sha256(json.dumps(self.hotwords).encode()).hexdigest()
