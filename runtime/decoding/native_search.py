"""Calls the C++ runtime's prefix beam search in the u2moe-kernels library. Its results equal those of `ctc` exactly."""

import ctypes
import json
import weakref
from collections.abc import Sequence
from functools import cache
from itertools import islice
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
_MAKERS: dict[str, tuple[type, ...]] = {
    "hotwords": (ctypes.c_char_p, _POINTER, _POINTER, _SIZE),
    "fusion": (*[ctypes.c_char_p] * 2, *[_POINTER] * 4, _SIZE, _POINTER, ctypes.c_int, ctypes.c_char_p),
    "grammar": (ctypes.c_char_p, _POINTER, _SIZE, ctypes.c_int),
    "begin": (_SIZE, ctypes.c_int, ctypes.c_double, *[_POINTER] * 3),
    "advance": (_POINTER, _POINTER, _SIZE, _SIZE),
    "finish": (_POINTER,),
    "commit": (_POINTER, _POINTER, _SIZE),
}
"""Functions that return a handle, or null on failure. A function gets a new name if its arguments change."""
_WRITERS: dict[str, tuple[type, ...]] = {
    "hypotheses": (_POINTER, _SIZE, _POINTER, _SIZE),
    "best": (_POINTER, _POINTER, _SIZE),
    "settled": (_POINTER, ctypes.c_char_p, _SIZE, _POINTER, _SIZE),
}
"""Functions that write numbers if there is room, and return how many there are, or 0 on failure."""
_ALL = 2**32 - 1


class _Handle:
    """Owns an object of the native library."""

    def __init__(self, library: ctypes.CDLL, value: int) -> None:
        self.value = value
        # Not freed at exit, when another thread may still use the object.
        weakref.finalize(self, library.u2moe_search_free, value).atexit = False


@cache
def _library(file: Path) -> ctypes.CDLL | None:
    """Load a library and declare its functions; return None if it is a version without the search."""
    library = ctypes.CDLL(str(file))

    def checked(handle: Any, _function: object, _arguments: object) -> Any:
        if handle is None:
            raise RuntimeError(library.u2moe_search_error().decode(errors="replace"))
        return handle

    try:
        library.u2moe_search_error.restype = ctypes.c_char_p
        library.u2moe_search_free.argtypes = library.u2moe_search_next_peak.argtypes = (_POINTER,)
        for name, arguments in (_MAKERS | _WRITERS).items():
            function = getattr(library, f"u2moe_search_{name}")
            function.argtypes, function.restype = arguments, _POINTER if name in _MAKERS else _SIZE
            if name in _MAKERS:
                function.errcheck = checked
    except AttributeError:
        return None
    return library


_handles: weakref.WeakKeyDictionary[ContextGraph | Fusion | PhraseGraph, _Handle] = weakref.WeakKeyDictionary()


class NativeSearch:
    """`PrefixBeamSearch` in the native library. Other Python threads run while it searches."""

    def __init__(
        self,
        library: ctypes.CDLL,
        beam_size: int,
        blank: int,
        blank_penalty: float,
        needs: tuple[ContextGraph | None, Fusion | None, PhraseGraph | None],
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {beam_size}")
        self._library, self._blank = library, blank
        handles = (None if each is None else _handle_of(library, each).value for each in needs)
        self._handle = _Handle(library, library.u2moe_search_begin(beam_size, blank, blank_penalty, *handles))

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Continue the search with the next log-probabilities [time, vocab]."""
        check_log_probs(log_probs, self._blank)
        if len(log_probs):
            rows = np.ascontiguousarray(log_probs, np.float32)
            if np.isnan(rows.max()):
                raise ValueError("log_probs contain NaN")
            with NATIVE_CALLS:
                self._library.u2moe_search_advance(self._handle.value, rows.ctypes.data, *rows.shape)

    def finish(self) -> None:
        """End the input; see `PrefixBeamSearch`."""
        self._library.u2moe_search_finish(self._handle.value)

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """Return at most `limit` hypotheses so far, best first."""
        return _parsed(self._read("hypotheses", _ALL if limit is None else limit))

    def best(self) -> Hypothesis:
        """Return the best hypothesis so far; see `PrefixBeamSearch`."""
        return _parsed(self._read("best"))[0]

    def settled(self, word_starts: bytes) -> tuple[list[int], bool]:
        """Return the settled but uncommitted tokens, and whether a word begins next; see `PrefixBeamSearch`."""
        ends, *tokens = self._read("settled", word_starts, len(word_starts))
        return list(map(int, tokens)), ends > 0

    def commit(self, tokens: Sequence[int]) -> None:
        """Commit further settled tokens."""
        rows = np.array(tokens, np.intc)
        self._library.u2moe_search_commit(self._handle.value, rows.ctypes.data, len(rows))

    def next_peak(self) -> int:
        """Return the earliest frame at which a token may follow the committed ones."""
        return int(self._library.u2moe_search_next_peak(self._handle.value))

    def _read(self, name: str, *arguments: Any) -> list[float]:
        """Call a function of `_WRITERS`, and return the numbers that it writes."""
        function, size = getattr(self._library, f"u2moe_search_{name}"), 256
        while True:
            found = np.empty(size)
            size = function(self._handle.value, *arguments, found.ctypes.data, len(found))
            if not size:
                raise MemoryError
            if size <= len(found):
                numbers: list[float] = found[:size].tolist()
                return numbers


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
    return NativeSearch(library, beam_size, blank, blank_penalty, (context, fusion, grammar))


def _parsed(values: list[float]) -> list[Hypothesis]:
    """Parse hypotheses from the numbers that `u2moe_search_hypotheses` writes."""
    rest, found = iter(values), []
    for _ in range(int(next(rest))):
        num, score, context_score, language_score = islice(rest, 4)
        tokens, times, probabilities = (list(islice(rest, int(num))) for _ in range(3))
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
    return found


def _handle_of(library: ctypes.CDLL, given: ContextGraph | Fusion | PhraseGraph) -> _Handle:
    """Return the library's object for hotwords, a language model or a grammar, and cache it."""
    if given not in _handles:
        if isinstance(given, ContextGraph):
            phrases, weights = _strings([phrase for phrase, _ in given.hotwords]), [each for _, each in given.hotwords]
            numbers, tokens = np.array(weights), _tokens(given.symbols)
            value = library.u2moe_search_hotwords(tokens, phrases, numbers.ctypes.data, len(numbers))
        elif isinstance(given, Fusion):
            ngrams, numbers = given.ngrams, np.array(given.numbers)
            arrays = ngrams.num_children().astype(np.uint64), ngrams.word, ngrams.log_prob, ngrams.backoff
            rows = [np.ascontiguousarray(array) for array in arrays]
            tokens, words = _tokens(given.symbols), "\n".join(ngrams.words).encode()
            value = library.u2moe_search_fusion(
                tokens,
                words,
                *(row.ctypes.data for row in rows),
                len(ngrams.word),
                numbers.ctypes.data,
                given.is_by_token,
                json.dumps({"classes": given.classes}).encode(),
            )
        else:
            tokens, lines = _tokens(given.vocabulary.symbols[: given.rest]), given.lines
            value = library.u2moe_search_grammar(tokens, _strings(lines), len(lines), given.blank)
        _handles[given] = _Handle(library, value)
    return _handles[given]


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _tokens(symbols: Sequence[str]) -> bytes:
    """Return the vocabulary as the content of tokens.txt."""
    return "".join(f"{symbol} {number}\n" for number, symbol in enumerate(symbols)).encode()
