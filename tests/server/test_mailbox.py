"""The messages of a WebSocket until they are read."""

import asyncio
import gc
import weakref

import pytest

from u2moe.runtime.server.errors import IdleError
from u2moe.runtime.server.mailbox import Mailbox
from u2moe.runtime.server.pace import Patience


def audio(num_bytes):
    return {"type": "websocket.receive", "bytes": bytes(num_bytes)}


def test_messages_come_in_order_and_late_ones_are_awaited():
    async def read():
        mailbox = Mailbox(lambda _: None)
        mailbox.put_nowait(audio(1))
        mailbox.put_nowait({"type": "websocket.receive", "text": "two"})
        asyncio.get_running_loop().call_later(0.05, mailbox.put_nowait, audio(3))
        patience = Patience(60.0, 1, "message", lambda: 0)
        return [await mailbox.get(patience) for _ in range(3)], mailbox

    messages, mailbox = asyncio.run(read())
    assert messages == [audio(1), {"type": "websocket.receive", "text": "two"}, audio(3)]
    mailbox.close()


def test_who_sends_faster_than_is_read_is_held_until_there_is_room():
    async def read():
        calls = []
        mailbox = Mailbox(calls.append)
        for _ in range(5):
            mailbox.put_nowait(audio(20_000))
        assert calls == [True]
        await mailbox.get()
        await mailbox.get()
        assert calls == [True]
        await mailbox.get()
        await mailbox.get()
        assert calls == [True, False]
        for _ in range(1000):
            mailbox.put_nowait(audio(0))  # those without content take memory, too
        assert calls == [True, False, True]

    asyncio.run(read())


def test_patience_counts_from_what_moves_it_on():
    async def read():
        mailbox, loop, amount = Mailbox(lambda _: None), asyncio.get_running_loop(), 0
        patience = Patience(0.5, 1, "message", lambda: amount)
        loop.call_later(0.3, mailbox.put_nowait, audio(1))
        await mailbox.get(patience)
        amount = 1
        patience.left_s()
        begin = loop.time()
        with pytest.raises(IdleError, match=r"less than 1 message came within 0\.5 seconds"):
            await mailbox.get(patience)
        assert loop.time() - begin >= 0.49  # the timer of the first wait would have ended it after 0.2
        mailbox.put_nowait(audio(2))
        with pytest.raises(IdleError):  # messages that are there already do not help
            await mailbox.get(patience)
        amount = 2
        assert await mailbox.get(patience) == audio(2)
        mailbox.close()

    asyncio.run(read())


def test_a_closed_one_refers_to_nobody():
    class Connection:
        def __init__(self):
            self.mailbox = Mailbox(self.hold)

        def hold(self, is_held):
            pass

    connection = Connection()
    gone = weakref.ref(connection)
    connection.mailbox.close()
    gc.disable()
    try:
        del connection
        assert gone() is None
    finally:
        gc.enable()


def test_a_closed_one_leaves_no_timer():
    async def read():
        mailbox = Mailbox(lambda _: None)
        waiting = asyncio.create_task(mailbox.get(Patience(3600.0, 1, "message", lambda: 0)))
        await asyncio.sleep(0)
        mailbox.put_nowait({"type": "websocket.disconnect", "code": 1006})
        await waiting
        mailbox.close()
        return [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]

    assert asyncio.run(read()) == []
