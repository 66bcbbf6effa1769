"""The event loop's selector: how often it looks at the sockets."""

import asyncio
import selectors
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from u2moe.runtime.server import event_loop
from u2moe.runtime.server.event_loop import GatheringSelector, run_in_loop


class Clock:
    """A clock that only sleeping moves; servers that other tests have running in other threads keep the real one."""

    def __init__(self):
        self.now = 100.0
        self.slept = []
        self.thread = threading.get_ident()

    def monotonic(self):
        return self.now if threading.get_ident() == self.thread else time.monotonic()

    def sleep(self, seconds):
        if threading.get_ident() != self.thread:
            time.sleep(seconds)
            return
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(event_loop, "time", clock)
    return clock


@pytest.fixture
def watched():
    """A selector that watches so many sockets with something to read, and as many without."""
    with ExitStack() as stack:
        selector = stack.enter_context(GatheringSelector())

        def watch(count):
            for _ in range(count):
                here, there = map(stack.enter_context, socket.socketpair())
                selector.register(here, selectors.EVENT_READ)
                selector.register(there, selectors.EVENT_READ)
                there.send(b"x")
            return selector

        yield watch


@pytest.mark.parametrize(("num_active", "rest_s"), [(1, 0.0001), (50, 0.005), (100, 0.01), (150, 0.01)])
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_the_interval_grows_with_the_number_of_active_sockets(clock, watched, num_active, rest_s, timeout):
    selector = watched(num_active)
    for passed, expected in ((1.0, []), (0.0, [rest_s]), (rest_s / 4, [rest_s * 3 / 4]), (rest_s, [])):
        clock.now += passed
        clock.slept.clear()
        assert len(selector.select(timeout)) == num_active
        assert clock.slept == pytest.approx(expected)


def test_sockets_that_have_become_silent_do_not_count(clock, watched):
    selector = watched(50)
    for key, _ in selector.select():
        key.fileobj.recv(1)
    for _ in range(2):
        clock.now += 0.2
        assert selector.select(0) == []
    assert selector.select(0.001) == []
    assert clock.slept == []


def test_other_work_of_the_loop_is_not_kept_waiting(clock, watched):
    selector = watched(50)
    selector.select()
    assert len(selector.select(0)) == 50
    assert clock.slept == []
    assert len(selector.select(0.001)) == 50
    assert clock.slept == pytest.approx([0.001])


def test_a_server_runs_in_such_a_loop():
    found = []

    async def main():
        found.append(asyncio.get_running_loop()._selector)

    run_in_loop(main())
    assert isinstance(found[0], GatheringSelector)
