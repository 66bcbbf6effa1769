"""Makes calls into onnxruntime safe while the interpreter exits."""

import atexit
import os
import threading

_LONGEST_S = 60.0  # Seconds to wait at exit for running calls


class _NativeCalls:
    """Context manager for calls that release the GIL within C++.

    If a thread returns from onnxruntime after the interpreter has begun to finalise, CPython ends the thread by
    unwinding its C++ frames. Unwinding calls std::terminate, and the process dies of SIGABRT. Therefore, the
    interpreter waits for running calls at exit, and daemon threads cannot start further calls.
    """

    def __init__(self) -> None:
        self._reset()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # no thread of the child is in a call

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._num_running = 0
        self._is_closed = False

    def __enter__(self) -> None:
        with self._changed:
            while self._is_closed and threading.current_thread().daemon:
                self._changed.wait()  # blocks until the process has ended
            self._num_running += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._num_running -= 1
            if self._is_closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Wait for running calls, and prevent daemon threads from starting more."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_running == 0, _LONGEST_S)


NATIVE_CALLS = _NativeCalls()  # Every run of a session is inside `with NATIVE_CALLS:`
