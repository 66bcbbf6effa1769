"""Calls into onnxruntime that run while the interpreter exits."""

from __future__ import annotations

import atexit
import os
import threading
from types import TracebackType

_LONGEST_S = 60.0
"""Seconds to wait at exit for calls that run."""


class _NativeCalls:
    """A context for each call that releases the GIL within C++, so that the interpreter can exit meanwhile.

    A thread that comes back from onnxruntime after the interpreter has begun to finalise is ended by CPython, by
    unwinding the C++ frames below it, which calls std::terminate: the process dies of SIGABRT. So calls that run are
    waited for at exit, and daemon threads begin none after that.
    """

    def __init__(self) -> None:
        self._reset()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # threads that were in a call are not in the child

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._num_running = 0
        self._is_closed = False

    def __enter__(self) -> None:
        with self._changed:
            while self._is_closed and threading.current_thread().daemon:
                self._changed.wait()  # until the process has ended
            self._num_running += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._num_running -= 1
            if self._is_closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Wait for the calls that run; daemon threads begin no more."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_running == 0, _LONGEST_S)


NATIVE_CALLS = _NativeCalls()
"""`with NATIVE_CALLS:` around each run of a session."""
