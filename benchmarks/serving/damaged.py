"""Do damaged messages ever do more to `u2moe serve` than end their connection with an error? Each from its seed.

    python -m u2moe.benchmarks.serving.damaged [--bundle BUNDLE] [--inputs 10000] [--output damaged.json]

So many conversations of each protocol, in which messages are cut, mixed up, repeated or overwritten. Every one must be
answered or closed within a minute, never by an error within the server, which must recognise all the same at the end,
with no more memory and file descriptors than after a tenth of them (or 1500, if that is more). Exits with 1 on a
failure.
"""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from u2moe.benchmarks.results.files import write_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import measured, of_bundle, recorded, resumed
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.benchmarks.serving.messages import WEBSOCKETS, Messages, upload, wyoming
from u2moe.benchmarks.serving.servers import RunningServer, free_port, our_server
from u2moe.benchmarks.serving.state import WARM_UP, State, speaks_still
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.recognizer import DEMO_FOLDER

REST, WYOMING = "/v1/audio/transcriptions", "wyoming"
PROTOCOLS = (*WEBSOCKETS, REST, WYOMING)
_AT_ONCE = 100
_PATIENCE_S = 60.0
_NUM_SAMPLES = 8_000
"""Enough for a last, shorter chunk and its second pass: it is the messages that are damaged."""
_ODD_TEXTS = ("", "{", "[" * 5000, "null", "NaN", '"\\ud800"', "[]", "1e999", '{"type": 7}', '{"eof": {}}', "Done")
_INTERNAL = 1011


def damaged(messages: Messages, random: np.random.Generator) -> Messages:
    """The same with some damage."""
    found = list(messages)
    for _ in range(int(random.integers(1, 4))):
        index = int(random.integers(len(found)))
        message = found[index]
        match int(random.integers(7)):
            case 0:
                del found[index]
            case 1:
                found.insert(int(random.integers(len(found) + 1)), message)
            case 2:
                found[index] = message[: int(random.integers(len(message) + 1))]
            case 3:
                found[index] = str(random.choice(_ODD_TEXTS))
            case 4:
                found[index] = random.bytes(int(random.integers(2000)))
            case 5:
                found[index] = message.encode() if isinstance(message, str) else message.decode("latin-1")
            case _:
                found[index] = overwritten(message, random)
        if not found:
            break
    return found


def overwritten(message: str | bytes, random: np.random.Generator) -> str | bytes:
    """The same with other characters or bytes in some places."""
    data = bytearray(message.encode() if isinstance(message, str) else message)
    for _ in range(int(random.integers(1, 9))):
        if data:
            data[int(random.integers(len(data)))] = int(random.integers(256))
    return data.decode(errors="replace") if isinstance(message, str) else bytes(data)


async def converse(server: RunningServer, path: str, messages: Messages) -> str:
    """Send them, and read to the end: what became of it."""
    url = f"ws://127.0.0.1:{server.port}{path}"
    try:
        async with asyncio.timeout(_PATIENCE_S), connect(url, proxy=None, ping_interval=None) as websocket:
            reading = asyncio.create_task(_read(websocket))
            try:
                for message in messages:
                    await websocket.send(message)
                await asyncio.wait({reading}, timeout=0.2)  # what is not over now is left
            except ConnectionClosed:
                pass
            finally:
                reading.cancel()
    except TimeoutError:
        return "no answer"
    except (OSError, WebSocketException) as error:
        return f"failed: {type(error).__name__}"
    return "error within the server" if websocket.close_code == _INTERNAL else "answered or closed"


async def _read(websocket: Any) -> None:
    async for _ in websocket:
        pass


async def exchange(port: int, data: bytes) -> str:
    """The same for bytes over TCP, whose end is said."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                writer.write_eof()
                answer = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return "no answer"
    except OSError:
        return "answered or closed"
    is_internal = answer.startswith(b"HTTP/1.1 5") and not answer.startswith(b"HTTP/1.1 503")
    return "error within the server" if is_internal else "answered or closed"


async def try_one(server: RunningServer, wyoming_port: int, protocol: str, seed: int, samples: np.ndarray) -> str:
    """One conversation of a protocol, from its seed."""
    random = np.random.default_rng([seed, PROTOCOLS.index(protocol)])
    if protocol in WEBSOCKETS:
        return await converse(server, protocol, damaged(WEBSOCKETS[protocol](samples), random))
    if protocol == WYOMING:
        pieces: Messages = list(wyoming(samples).splitlines(keepends=True))
        return await exchange(wyoming_port, _joined(damaged(pieces, random)))
    wav = io.BytesIO()
    soundfile.write(wav, samples, 16_000, format="WAV")
    pieces = list(upload(wav.getvalue()).splitlines(keepends=True))
    body = _joined(damaged(pieces, random))
    head = f"POST {REST} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return await exchange(server.port, f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode() + body)


def _joined(pieces: Messages) -> bytes:
    return b"".join(piece.encode(errors="replace") if isinstance(piece, str) else piece for piece in pieces)


async def try_all(server: RunningServer, wyoming_port: int, protocol: str, num_inputs: int) -> dict[str, Any]:
    """So many conversations of a protocol, a few at a time."""
    samples = (read_audio(DEMO_FOLDER / "clips" / "command.flac", 16_000)[:_NUM_SAMPLES] * 32767).astype(np.int16)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    start = None
    for begin in range(0, num_inputs, _AT_ONCE):
        seeds = range(begin, min(begin + _AT_ONCE, num_inputs))
        tasks = (try_one(server, wyoming_port, protocol, seed, samples) for seed in seeds)
        for seed, outcome in zip(seeds, await asyncio.gather(*tasks), strict=True):
            outcomes[outcome] += 1
            if outcome != "answered or closed":
                failures.append(f"{protocol} {seed}: {outcome}")
        if start is None and begin >= max(num_inputs // 10, WARM_UP):
            start = State.of(server.pid)
    if not await speaks_still(server):
        failures.append(f"{protocol}: afterwards it does not recognise what it did before")
    end = State.of(server.pid)
    failures += [f"{protocol}: {growth}" for growth in end.grown_since(start or end)]
    return {
        "outcomes": dict(outcomes),
        "start": vars(start or end),
        "end": vars(end),
        "num_failures": len(failures),
        "failures": failures[:20],
    }


def run(bundle: Path, protocols: Sequence[str], num_inputs: int, file: Path | None) -> dict[str, Any]:
    """A server and so many conversations for each protocol; written to `file` after each."""
    content: dict[str, Any] = {"protocols": {}} if file is None else resumed(file, {"protocols": {}})
    for protocol in protocols:
        report(protocol)
        port = free_port()
        with our_server(bundle, arguments=["--protocol", f"wyoming={port}", "--idle-timeout", "20"]) as server:
            content["protocols"][protocol] = asyncio.run(try_all(server, port, protocol, num_inputs))
        content = {**recorded(content), **of_bundle(bundle)}
        if file is not None:
            write_json(file, content)
    return content


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each protocol."""
    rows = []
    found = {name: results["protocols"][name] for name in PROTOCOLS if name in results["protocols"]}
    for protocol, own in found.items():
        start, end = own["start"], own["end"]
        outcomes = "; ".join(f"{count} {outcome}" for outcome, count in own["outcomes"].items())
        memory = f"{start['resident_mb']:.0f}, {end['resident_mb']:.0f}"
        rows.append((protocol, outcomes, memory, f"{start['num_files']}, {end['num_files']}"))
    header = ("protocol", "conversations", "memory, MB, after the warm-up and at the end", "open files, likewise")
    return {
        "table": table(header, rows, left=2),
        "failures": str(sum(own["num_failures"] for own in found.values())),
        "inputs": str(min((sum(own["outcomes"].values()) for own in found.values()), default=0)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = script_parser("serving.damaged", __doc__)
    parser.add_argument("--bundle", type=Path, default=DEMO_FOLDER, help="default: the demo model")
    parser.add_argument("--inputs", type=int, default=10_000, help="conversations of each protocol (default: 10000)")
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=PROTOCOLS, help="default: all")
    parser.add_argument("--output", type=Path, help="JSON file, which keeps the results of other protocols")
    args = parser.parse_args(arguments)
    results = run(args.bundle, args.protocols, args.inputs, args.output)
    print(f"{measured(results)}\n\n{values(results)['table']}")
    failures = [failure for own in results["protocols"].values() for failure in own["failures"]]
    for failure in failures:
        print(f"FAILED: {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    run_script(main)
