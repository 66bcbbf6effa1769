"""Calls the C++ runtime's prefix beam search in the u2moe-kernels library. Its results equal those of `ctc` exactly."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.decoding.ctc import Hypothesis, PrefixBeamSearch, check_log_probs
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.model.calls import NATIVE_CALLS

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "hotwords": (ctypes.c_char_p, _POINTER, _POINTER, _SIZE),
    "fusion": (*[ctypes.c_char_p] * 2, *[_POINTER] * 4, _SIZE, _POINTER, ctypes.c_int, ctypes.c_char_p),
    "grammar": (ctypes.c_char_p, _POINTER, _SIZE, ctypes.c_int),
    "begin": (_SIZE, ctypes.c_int, ctypes.c_double, *[_POINTER] * 3),
    "advance": (_POINTER, _POINTER, _SIZE, _SIZE),
    "finish": (_POINTER,),
    "commit": (_POINTER, _POINTER, _SIZE),
    "free": (_POINTER,),
}
"""Functions that return a handle, or null on failure. A function gets a new name if its arguments change."""
_WRITERS: dict[str, tuple[type, ...]] = {
    "hypotheses": (_POINTER, _SIZE, _POINTER, _SIZE),
    "best": (_POINTER, _POINTER, _SIZE),
    "settled": (_POINTER, ctypes.c_char_p, _SIZE, _POINTER, _SIZE),
}
"""Functions that write numbers if there is room, and return how many there are, or 0 on failure."""
_ALL = 2**32 - 1
_ROOM = 256


class _Library:
    """The search functions of the u2moe-kernels library."""

    def __init__(self, file: Path) -> None:
        self._functions = ctypes.CDLL(str(file))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._functions, f"u2moe_search_{name}")
            function.argtypes, function.restype = arguments, _POINTER
        self._functions.u2moe_search_error.restype = ctypes.c_char_p
        for name, arguments in _WRITERS.items():
            function = getattr(self._functions, f"u2moe_search_{name}")
            function.argtypes, function.restype = arguments, _SIZE
        self.next_peak = self._functions.u2moe_search_next_peak
        self.next_peak.argtypes = (_POINTER,)

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function and return its handle; raise RuntimeError with the library's message on failure."""
        handle: int | None = getattr(self._functions, f"u2moe_search_{name}")(*arguments)
        if handle is None:
            raise RuntimeError(self._functions.u2moe_search_error().decode(errors="replace"))
        return handle

    def read(self, name: str, *arguments: Any) -> list[float]:
        """Call a function and return the numbers that it writes."""
        room = _ROOM
        while True:
            found = np.empty(room)
            size = getattr(self._functions, f"u2moe_search_{name}")(*arguments, found.ctypes.data, room)
            if 0 < size <= room:
                numbers: list[float] = found[:size].tolist()
                return numbers
            if not size:
                raise MemoryError
            room = size

    def free(self, handle: int) -> None:
        """Free the object of a handle."""
        self._functions.u2moe_search_free(handle)


class _Handle:
    """Owns an object of the native library."""

    def __init__(self, library: _Library, name: str, *arguments: Any) -> None:
        self.value = library.call(name, *arguments)
        # Not freed at exit, when another thread may still use the object.
        weakref.finalize(self, library.free, self.value).atexit = False


@cache
def _library(file: Path) -> _Library | None:
    """Load a library; return None if it is a version without the search."""
    try:
        return _Library(file)
    except AttributeError:
        return None


def new_search(
    file: Path | None,
    beam_size: int,
    blank: int = 0,
    context: ContextGraph | None = None,
    fusion: Fusion | None = None,
    *,
    grammar: PhraseGraph | None = None,
    blank_penalty: float = 0.0,
) -> PrefixBeamSearch | NativeSearch:
    """Create a prefix beam search: a native one if the library `file` contains it, otherwise one in Python."""
    library = None if file is None else _library(file)
    if library is None:
        return PrefixBeamSearch(beam_size, blank, context, fusion, grammar=grammar, blank_penalty=blank_penalty)
    return NativeSearch(library, beam_size, blank, (context, fusion, grammar), blank_penalty=blank_penalty)


class NativeSearch:
    """`PrefixBeamSearch` in the native library. Other Python threads run while it searches."""

    def __init__(
        self,
        library: _Library,
        beam_size: int,
        blank: int,
        needs: tuple[ContextGraph | None, Fusion | None, PhraseGraph | None],
        *,
        blank_penalty: float,
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {beam_size}")
        self._library = library
        self._blank = blank
        handles = (None if each is None else _handle_of(library, each).value for each in needs)
        self._handle = _Handle(library, "begin", beam_size, blank, blank_penalty, *handles)

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Continue the search with the next log-probabilities [time, vocab]."""
        check_log_probs(log_probs, self._blank)
        if len(log_probs):
            rows = np.ascontiguousarray(log_probs, np.float32)
            if np.isnan(rows.max()):
                raise ValueError("log_probs contain NaN")
            with NATIVE_CALLS:
                self._library.call("advance", self._handle.value, rows.ctypes.data, *rows.shape)

    def finish(self) -> None:
        """End the input; see `PrefixBeamSearch`."""
        self._library.call("finish", self._handle.value)

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """Return at most `limit` hypotheses so far, best first."""
        return _parsed(self._library.read("hypotheses", self._handle.value, _ALL if limit is None else limit))

    def best(self) -> Hypothesis:
        """Return the best hypothesis so far; see `PrefixBeamSearch`."""
        return _parsed(self._library.read("best", self._handle.value))[0]

    def settled(self, word_starts: bytes) -> tuple[list[int], bool]:
        """Return the settled but uncommitted tokens, and whether a word begins next; see `PrefixBeamSearch`."""
        ends, *tokens = self._library.read("settled", self._handle.value, word_starts, len(word_starts))
        return list(map(int, tokens)), ends > 0

    def commit(self, tokens: Sequence[int]) -> None:
        """Commit further settled tokens."""
        rows = np.array(tokens, np.intc)
        self._library.call("commit", self._handle.value, rows.ctypes.data, len(rows))

    def next_peak(self) -> int:
        """Return the earliest frame at which a token may follow the committed ones."""
        return int(self._library.next_peak(self._handle.value))


def _parsed(values: list[float]) -> list[Hypothesis]:
    """Parse hypotheses from the numbers that `u2moe_search_hypotheses` writes."""
    found, place = [], 1
    for _ in range(int(values[0])):
        num, (score, context_score, language_score) = int(values[place]), values[place + 1 : place + 4]
        starts = (place + 4 + part * num for part in range(3))
        tokens, times, probabilities = (values[start : start + num] for start in starts)
        found.append(
            Hypothesis(
                tokens=list(map(int, tokens)),
                score=score,
                times=list(map(int, times)),
                context_score=context_score,
                probabilities=probabilities,
                language_score=language_score,
            )
        )
        place += 4 + 3 * num
    return found


_handles: weakref.WeakKeyDictionary[ContextGraph | Fusion | PhraseGraph, _Handle] = weakref.WeakKeyDictionary()


def _handle_of(library: _Library, given: ContextGraph | Fusion | PhraseGraph) -> _Handle:
    """Return the library's object for hotwords, a language model or a grammar, and cache it."""
    handle = _handles.get(given)
    if handle is None:
        if isinstance(given, ContextGraph):
            weights = np.array([weight for _, weight in given.hotwords])
            phrases = _strings([phrase for phrase, _ in given.hotwords])
            handle = _Handle(library, "hotwords", _tokens(given.symbols), phrases, weights.ctypes.data, len(weights))
        elif isinstance(given, Fusion):
            handle = _model(library, given)
        else:
            tokens, lines = _tokens(given.vocabulary.symbols[: given.rest]), given.lines
            handle = _Handle(library, "grammar", tokens, _strings(lines), len(lines), given.blank)
        _handles[given] = handle
    return handle


def _model(library: _Library, fusion: Fusion) -> _Handle:
    ngrams = fusion.ngrams
    arrays = ngrams.num_children().astype(np.uint64), ngrams.word, ngrams.log_prob, ngrams.backoff
    rows = [np.ascontiguousarray(array) for array in arrays]
    numbers = np.array(fusion.numbers)
    words = "\n".join(ngrams.words).encode()
    return _Handle(
        library, "fusion", _tokens(fusion.symbols), words, *(row.ctypes.data for row in rows), len(ngrams.word),
        numbers.ctypes.data, fusion.is_by_token, json.dumps({"classes": fusion.classes}).encode(),
    )  # fmt: skip


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _tokens(symbols: Sequence[str]) -> bytes:
    """Return the vocabulary as the content of tokens.txt."""
    return "".join(f"{symbol} {number}\n" for number, symbol in enumerate(symbols)).encode()
