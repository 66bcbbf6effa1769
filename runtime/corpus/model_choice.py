"""A picklable choice of model and decoding options; worker processes load it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.recognizer import Recognizer


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A bundle and how to decode.

    Attributes:
        directory: folder of the bundle; None: the demo model.
        settings: where and how the graphs run; without `sess_options`, which other processes cannot be given.
        options: how to decode.
        hotwords: phrases to prefer, with or without weights; None: those of the bundle.
    """

    directory: str | None = None
    settings: SessionSettings = field(default_factory=SessionSettings)
    options: DecodingOptions = field(default_factory=DecodingOptions)
    hotwords: tuple[str | tuple[str, float], ...] | None = None

    def load(self) -> Recognizer:
        """A recogniser; see `Recognizer.load` for errors."""
        hotwords = list(self.hotwords) if self.hotwords is not None else None
        return Recognizer.load(self.directory, self.settings, options=self.options, hotwords=hotwords)

    @property
    def can_be_forked(self) -> bool:
        """Whether forked processes can use a loaded model: on the CPU, without threads of onnxruntime."""
        return self.settings.providers == (DEFAULT_PROVIDER,) and self.num_threads == 1

    @property
    def num_threads(self) -> int:
        """Threads within one operator."""
        return self.settings.num_threads or 1

    @property
    def hotwords_digest(self) -> str | None:
        """SHA-256 of the hotwords; None: those of the bundle."""
        return None if self.hotwords is None else hashlib.sha256(json.dumps(self.hotwords).encode()).hexdigest()
