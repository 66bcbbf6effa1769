"""How do attacks or a slower machine affect the speakers that `u2moe serve` has accepted?

    python -m u2moe.benchmarks.studies.hostile [--kinds KIND...] [--speakers 8] [--rounds 9] [--minutes 0] [--cores 0]

docs/results/serving.md explains the method. Rounds without and under attack alternate, since the machine's speed
drifts; the median round of each counts. The rounds of an attack are saved immediately, and later runs skip it.
--cores are the server's: start this script with `taskset` on other cores, and with nice -n -15 on a busy machine.
"""

import argparse
import asyncio
import contextlib
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from u2moe.benchmarks.instruments.host import status_bytes
from u2moe.benchmarks.instruments.statistics import percentiles, show_progress
from u2moe.benchmarks.results.files import record, resumed
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.serving import summary
from u2moe.benchmarks.studies.shared import load
from u2moe.benchmarks.studies.shared.load import RunningServer
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.runtime.bundle_location import DEMO_FOLDER

NUM_STREAMS = 8  # maximum number of streams of each attack's key
MEGABYTE = 1 << 20
KEY = "key-of-speakers"
CONTROL = "no attack, busy clients' core"  # attackers occupy that core, which may be a hyper-thread of the server's
MORE = "no attack, eight more streams"  # with default options
SLOWER = {
    "slower": (0, True), "slower, few speakers": (0, False), "slower, lower priority": (10, True), CONTROL: (10, False),
}  # fmt: skip
"""Niceness of the busy process, and whether the speakers fill the server's capacity."""
MIXTURE = "all together"
MOST_SLOWER = 1.2  # maximum ratio of latencies during and before attacks
HEALTH_S = 0.05
_AHEAD_S = 2.0
ELSEWHERE = ("127.0.0.2", 0)  # Address from which attackers connect. Speakers and the health check use another address.
_POST = "POST /v1/audio/transcriptions?{} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x"
_PART = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
_REQUEST = f"GET /healthz?{'a=b&' * 1000} HTTP/1.1\r\nHost: localhost\r\n" + "X: y, z\r\n" * 1000 + "\r\n"
_UPGRADE = "GET /stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
_UPGRADE += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nContent-Length: 5\r\n\r\nhello"
Attack = Callable[[str], Coroutine[Any, Any, None]]  # client of the server at a URL with an API key


async def _one_sample(address: str) -> None:
    async with connect(address, proxy=None, local_addr=ELSEWHERE) as websocket:
        await websocket.send("{}")
        await websocket.recv()
        while not websocket.transport.is_closing():  # later writes would be lost without an error
            websocket.transport.write((b"\x82\x82" + bytes(6)) * 1000)
            await asyncio.sleep(0.01 if websocket.transport.get_write_buffer_size() < MEGABYTE else 0.1)


async def _one_byte_chunks(address: str) -> None:
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, local_addr=ELSEWHERE)
    with contextlib.closing(writer):
        head = f"{_POST.format(parts.query)}\r\nTransfer-Encoding: chunked\r\n\r\n{len(_PART):x}\r\n{_PART}\r\n"
        writer.write(head.encode())
        while not reader.at_eof():
            writer.write(b"1\r\nx\r\n" * 1000)
            await writer.drain()
            await asyncio.sleep(0)


@functools.cache
def _many_hotwords(num_bytes: int) -> str:
    return '{"hotwords": [' + ",".join(['"A"'] * (num_bytes // 4 - 5)) + "]}"


async def _sent(address: str, message: str | list[bytes]) -> None:
    async with connect(address, proxy=None, local_addr=ELSEWHERE) as websocket:
        await websocket.send(message)
        await websocket.recv()


async def _plain(address: str, data: str, seconds: float = 0.0, times: int = 1) -> None:
    """Send `data` over TCP `times` times, `seconds` apart, and read only a part of each response."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, local_addr=ELSEWHERE)
    with contextlib.closing(writer):
        for _ in range(times):
            writer.write(data.encode())
            await writer.drain()
            await asyncio.sleep(seconds)
            if data and not await reader.read(1 << 16):
                return


async def _punycode(address: str) -> None:
    body = f'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n{"a" * 60_000}-b\r\n--x--\r\n'
    head = f"{_POST.format(urlsplit(address).query)}; charset=punycode\r\nContent-Length: {len(body)}\r\n\r\n"
    await _plain(address, head + body)


async def _unread_pongs(address: str) -> None:
    async with connect(address, proxy=None, local_addr=ELSEWHERE, max_queue=1) as websocket:
        websocket.transport.pause_reading()
        while not websocket.transport.is_closing():
            websocket.transport.write((b"\x89\xfd" + bytes(4 + 125)) * 1000)
            await asyncio.sleep(0.01 if websocket.transport.get_write_buffer_size() < MEGABYTE else 1.0)


async def _noise(address: str, options: str) -> None:
    async with connect(address, proxy=None, local_addr=ELSEWHERE) as websocket:
        await websocket.send(options)
        await websocket.recv()
        for _ in range(100):
            await websocket.send(os.urandom(3200))
            await asyncio.sleep(0.1)


@functools.cache
def _dear_options() -> str:
    words = ",".join(f'"{chr(65 + number % 26)}{chr(65 + number // 26 % 26)} SEVEN"' for number in range(1000))
    return f'{{"beam_size": 40, "hotwords": [{words}]}}'


ATTACKS: dict[str, tuple[int, Attack]] = {
    "frames of one sample": (NUM_STREAMS, _one_sample),
    "HTTP chunks of one byte": (NUM_STREAMS, _one_byte_chunks),
    "options of 15 MB": (NUM_STREAMS, lambda address: _sent(address, _many_hotwords(15 * MEGABYTE))),
    "options of 1 MB": (NUM_STREAMS, lambda address: _sent(address, _many_hotwords(MEGABYTE - 100))),
    "frames of 16 MB, refused": (40, lambda address: _sent(address, [bytes(MEGABYTE)] * 16)),
    "silent connections": (200, lambda address: _plain(address, "", 5.0)),
    "requests of 15 kB": (200, lambda address: _plain(address, _REQUEST, 0.02, 500)),
    "invalid upgrades": (200, lambda address: _plain(address, _UPGRADE)),
    "forms in punycode": (NUM_STREAMS, _punycode),
    "unread pongs": (NUM_STREAMS, _unread_pongs),
    "hotwords with a wide beam": (20, lambda address: _noise(address, _dear_options())),
    MORE: (NUM_STREAMS, lambda address: _noise(address, "{}")),
}


def key_of(name: str) -> str:
    """Return the API key of an attack."""
    return f"key-of-{name.replace(' ', '-')}"


def attack(has_begun: Event, port: int, names: Sequence[str]) -> None:
    """Attack in a loop until the process is killed."""
    os.nice(10)  # leaves enough CPU time for the speakers
    has_begun.set()

    async def again(name: str) -> None:
        while True:
            # AttributeError: websockets fails so if the server closes a connection while it sends a large message.
            with contextlib.suppress(OSError, WebSocketException, EOFError, TimeoutError, AttributeError):
                await ATTACKS[name][1](f"ws://127.0.0.1:{port}/stream?api_key={key_of(name)}")
            await asyncio.sleep(0.05)

    async def everyone() -> None:
        await asyncio.gather(*(again(name) for name in names for _ in range(ATTACKS[name][0])))

    asyncio.run(everyone())


def burn(has_begun: Event, cores: Sequence[int], niceness: int) -> None:
    """Keep some cores busy until the process is killed."""
    os.nice(niceness)
    os.sched_setaffinity(0, cores)
    has_begun.set()
    time.sleep(_AHEAD_S + 3)  # speakers start after `_AHEAD_S`; two seconds later, all are accepted
    while True:
        pass


@contextlib.contextmanager
def meanwhile(work: Callable[..., None], *given: Any) -> Iterator[None]:
    """Run `work` in another process and kill the process after the block. The block starts two seconds after `work`."""
    context = multiprocessing.get_context("spawn")
    has_begun = context.Event()
    process = context.Process(target=work, args=(has_begun, *given))
    process.start()
    try:
        while not has_begun.wait(1.0):
            if not process.is_alive():
                raise RuntimeError(f"{work.__name__} ended before it began")
        time.sleep(_AHEAD_S)
        yield
        if not process.is_alive():
            raise RuntimeError(f"{work.__name__} ended before the speakers did")
    finally:
        process.kill()
        process.join()


def listen(server: RunningServer, buffers: Sequence[bytes], count: int, first: dict[load.Key, int]) -> dict[str, Any]:
    """Measure the latencies of the speakers' results and of repeated health checks, and the server's memory."""
    health: list[float] = []

    async def check() -> None:
        while True:
            begin = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            await reader.read()
            writer.close()
            health.append(time.perf_counter() - begin)
            await asyncio.sleep(HEALTH_S)

    async def speak() -> load.Received:
        checks = asyncio.create_task(check())
        try:
            return await load.speak_together(server.url, buffers, count, first)
        finally:
            checks.cancel()

    received = asyncio.run(speak())
    return {**summary(received), "health": percentiles(health), "rss": status_bytes("VmRSS", server.pid)}


@contextlib.contextmanager
def guarded(cores: str | None, capacity: int | None) -> Iterator[RunningServer]:
    """Run our server with one key for the speakers and one for each attack."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        lines = (f"{key_of(name)} {key_of(name)} {NUM_STREAMS}\n" for name in ATTACKS)
        keys.write_text("".join([f"speakers {KEY}\n", *lines]), encoding="utf-8")
        options = ["--api-key", str(keys)]
        with load.our_server(DEMO_FOLDER, capacity=capacity, cores=cores, arguments=options) as server:
            yield replace(server, path=f"/sherpa?api_key={KEY}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each kind of attack that is not yet in the results' `cells`. Save each measurement immediately."""
    content = resumed(args.results, {"cells": {}})
    buffers, first = load.speech_buffers(args.seconds), dict[load.Key, int]()
    for kind in args.kinds:
        is_mixture, (niceness, is_full) = kind == MIXTURE, SLOWER.get(kind, (0, False))
        if (cell := f"{kind}, {args.minutes:g} minutes" if is_mixture else kind) in content["cells"]:
            continue
        with guarded(args.cores, None if is_full else args.speakers + NUM_STREAMS * len(ATTACKS)) as server:
            count = (server.capacity or 1) if is_full else args.speakers
            show_progress(f"{kind}: {count} speakers")
            first = first or load.results_alone(server.url, buffers)
            listen(server, buffers, count, first)  # warm-up: the first round after the start is the slowest
            own = map(int, (args.cores or "0").split(","))
            cores = sorted(os.sched_getaffinity(0) if kind == CONTROL else own)
            names = [name for name in ATTACKS if name != MORE] if is_mixture else [kind]
            work = (burn, cores, niceness) if kind in SLOWER else (attack, server.port, names)
            before, rounds = list[Any](), list[Any]()
            for number in range(args.rounds):
                before.append(listen(server, buffers, count, first))
                with meanwhile(*work):
                    end = time.monotonic() + 60 * args.minutes * is_mixture / args.rounds
                    while len(rounds) <= number or time.monotonic() < end:
                        received = listen(server, buffers, count, first)
                        # Keep only the numbers for the page, because an hour has hundreds of rounds.
                        p95 = {name: {"p95": round(received[name]["p95"], 4)} for name in ("partial", "health")}
                        rounds.append(p95 | {name: received[name] for name in ("rss", "num_failed", "num_refused")})
        content["cells"][cell] = {"speakers": count, "before": _middle(before), "rounds": rounds}
        record(args.results, content)
    return content


def ratio(cell: Mapping[str, Any]) -> float:
    """Return the p95 latency of partial results in the median round during an attack, divided by the one before."""
    return float(_p95(_middle(cell["rounds"])) / _p95(cell["before"]))


def _p95(listened: Mapping[str, Any]) -> float:
    return float(listened["partial"]["p95"])


def _middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the round whose p95 is the median."""
    return sorted(rounds, key=_p95)[len(rounds) // 2]


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for the page: a table with a row for each attack, and how many speakers failed in all."""
    rows, num_failed = [], 0
    for kind, cell in results["cells"].items():
        pair, worst = [cell["before"], _middle(cell["rounds"])], max(map(_p95, cell["rounds"]))
        num_failed += sum(each["num_failed"] + each["num_refused"] for each in cell["rounds"])
        partials = " → ".join(f"{1000 * _p95(each):.0f}" for each in pair)
        memory = " → ".join(f"{each['rss'] / 1e6:.0f}" for each in (cell["before"], cell["rounds"][-1]))
        health = f"{1000 * pair[1]['health']['p95']:.0f}"
        figures = [partials, f"{ratio(cell):.2f}", f"{1000 * worst:.0f}", health, memory]
        rows.append((kind, str(cell["speakers"]), *figures))
    waits = ("partial p95, ms", "ratio", "worst round", "health p95, ms")
    return {"table": table(("", "speakers", *waits, "memory, MB"), rows), "failed": str(num_failed)}


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield a limit on `ratio` for each kind of attack or slowdown."""
    for kind, cell in results["cells"].items():
        if kind not in (CONTROL, MORE):
            name = f"partial p95, during / before: {kind}"
            yield Target(name=name, found=ratio(cell), limit=MOST_SLOWER, at_most=True)


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("hostile", __doc__)
    kinds = [*ATTACKS, *SLOWER, MIXTURE]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--speakers", type=int, default=8, metavar="N", help="number of speakers (default: 8)")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of speech per speaker (default: 15)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds before and during (default: 9)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="minutes of all attacks together (default: --rounds)"
    )
    parser.add_argument("--cores", metavar="LIST", help="cores for the server, in taskset's format (default: all)")
    args = parser.parse_args(arguments)
    print(values(run(args))["table"])
