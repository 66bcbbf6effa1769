"""Runs servers in separate processes, and measures the latencies of results for simultaneous speakers.

Clients speak sherpa-onnx's protocol. First, a single speaker sends the buffers one by one, and
waits after each until no more results arrive. This shows which buffer makes each result possible.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.benchmarks.studies.shared.programs import make_environment, sherpa_graphs
from u2moe.export.sherpa import ONLINE
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.manifest import TOKENS_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.model.native import VARIABLE

OURS, OURS_NATIVE, THEIRS = "u2moe", "u2moe with native kernels", "sherpa-onnx"
THEIRS_WITH_MODEL = "sherpa-onnx with a language model"
REQUIREMENTS = ("sherpa-onnx-bin==2.0.1", "sherpa-onnx-core==2.0.1")
NO_LIMIT = 100_000
SAMPLE_RATE = 16_000
BUFFER_S = 0.1
_QUIET_S, _LAST_WAIT_S = 0.15, 60.0
_SPREAD_S = 2.0  # seconds within which all speakers start
_END_BUFFERS = 10  # results of the last buffers do not count: they depend on when the end is announced
Key = tuple[int, bool, str]  # a result: the number of its segment, whether it is final, and its text
_START_S, _STOP_S = 900.0, 30.0  # maximum seconds; on a busy machine, loading takes minutes


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that speaks sherpa-onnx's protocol at `path` of a `port` on the loopback address."""

    port: int
    path: str
    pid: int
    capacity: int | None = None  # maximum number of live streams, as reported by the server; None: not reported

    @property
    def url(self) -> str:
        """URL for connections."""
        return f"ws://127.0.0.1:{self.port}{self.path}"


@contextlib.contextmanager
def our_server(
    bundle: Path,
    *,
    capacity: int | None = NO_LIMIT,
    cores: str | None = None,
    kernels: str = "auto",
    arguments: Sequence[str] = (),
) -> Iterator[RunningServer]:
    """Run `u2moe serve` on `cores` (as for taskset; None: all). `capacity` is the limit of streams; None: measured."""
    port = free_port()
    command = ["env", f"{VARIABLE}={kernels}", sys.executable, "-m", "u2moe", "serve", str(bundle)]
    command += ["--port", str(port), *arguments, *([] if capacity is None else ["--capacity", str(capacity)])]
    with _process(command, cores, lambda said: "live streams at a time\n" in said) as (process, said):
        words = next((line.split() for line in said.splitlines() if "live streams" in line), [])
        found = int(words[words.index("live") - 1]) if words else None
        yield RunningServer(port=port, path="/sherpa", pid=process.pid, capacity=found)


@contextlib.contextmanager
def sherpa_server(
    bundle: Path, folder: Path, *, search_graph: Path | None = None, cores: str | None = None
) -> Iterator[RunningServer]:
    """Run sherpa-onnx's server with the bundle's weights. The server and its graphs are stored in `folder`.

    It searches greedily or, with a language model as `search_graph`, with as many hypotheses as the bundle.
    """
    folder = folder.resolve()
    environment = make_environment(folder / "sherpa-onnx-bin", REQUIREMENTS)
    graphs = sherpa_graphs(bundle, folder / "graphs" / bundle.name)
    port = free_port()

    def listens(_: str) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    command = [str(Path(environment["python"]).with_name("sherpa-onnx-online-websocket-server")), f"--port={port}"]
    command += [f"--wenet-ctc-model={graphs / ONLINE.file}", f"--tokens={graphs / TOKENS_FILE}"]
    command += [f"--wenet-ctc-chunk-size={CHUNK_SIZE}", f"--wenet-ctc-num-left-chunks={NUM_LEFT_CHUNKS}"]
    command += ["--num-work-threads=1", "--max-batch-size=32"]
    if search_graph:
        beam_size = Bundle.open(bundle).manifest.decoding.beam_size
        command += [f"--ctc-graph={search_graph.resolve()}", f"--ctc-max-active={beam_size}"]
    # The server writes log.txt into its working directory.
    with _process(command, cores, listens, folder) as (process, _):
        yield RunningServer(port=port, path="/", pid=process.pid)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and its children. Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_s(int(child)) for child in children)


def free_port() -> int:
    """Return a free TCP port on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _process(
    command: Sequence[str], cores: str | None, is_ready: Callable[[str], bool], folder: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a process, wait until `is_ready` accepts its output, and yield the process and its output."""
    command = [*(["taskset", "-c", cores] if cores else []), *command]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)  # noqa: S603 - one of two servers
        try:
            deadline = time.monotonic() + _START_S
            while not is_ready(said := Path(log.name).read_text(encoding="utf-8", errors="replace")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start: {said[-500:]}")
                time.sleep(0.1)
            yield process, said
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(kw_only=True)
class Received:
    """Results received by speakers. Delays, in seconds, begin when the buffer that makes a result possible is sent."""

    partials: list[float] = field(default_factory=list)  # delays of partial results in seconds
    finals: list[float] = field(default_factory=list)  # those of final results
    num_expected: int = 0  # each accepted speaker should receive as many results as when it is alone
    num_refused: int = 0  # number of speakers that the server refused
    failures: list[str] = field(default_factory=list)  # messages of other errors
    lags: list[float] = field(default_factory=list)  # seconds by which buffers were sent too late


def speech_buffers(seconds: float) -> list[bytes]:
    """Return `seconds` of the demo recordings, repeated and with pauses between them, in float32 buffers of 100 ms."""
    clips = [read_audio(clip, SAMPLE_RATE) for clip in sorted((DEMO_FOLDER / "clips").glob("*.flac"))]
    pause = np.zeros(round(1.5 * SAMPLE_RATE), np.float32)
    speech = np.concatenate([part for clip in clips for part in (clip, pause)])
    samples: npt.NDArray[np.float32] = np.resize(speech, round(seconds * SAMPLE_RATE))
    size = round(BUFFER_S * SAMPLE_RATE)
    return [samples[start : start + size].tobytes() for start in range(0, len(samples), size)]


async def first_buffers(url: str, buffers: Sequence[bytes]) -> dict[Key, int]:
    """Return, for each result of one speaker, the index of the last buffer sent; `len(buffers)` after "Done"."""
    found: dict[Key, int] = {}
    async with connect(url, proxy=None) as websocket:
        for number, buffer in enumerate(buffers):
            await websocket.send(buffer)
            with contextlib.suppress(TimeoutError):
                while True:
                    found.setdefault(key_of(await asyncio.wait_for(websocket.recv(), _QUIET_S)), number)
        await websocket.send("Done")
        async for message in websocket:
            if message == "Done!":
                break
            found.setdefault(key_of(message), len(buffers))
    return found


def results_alone(url: str, buffers: Sequence[bytes]) -> dict[Key, int]:
    """Return those results of `first_buffers` that arrive before the last `_END_BUFFERS` buffers."""
    first = asyncio.run(first_buffers(url, buffers))
    return {key: number for key, number in first.items() if number < len(buffers) - _END_BUFFERS}


async def speak_together(
    url: str, buffers: Sequence[bytes], count: int, first: dict[Key, int], *, num_slots: int | None = None
) -> Received:
    """Return the results of `count` speakers who start at random times within two seconds.

    With `num_slots`, speakers start in groups of this size, one group every two seconds. The server accepts the first
    group, whose speakers start at the same times as if the group were measured alone. Other start times would change
    which chunks coincide, and thus the delays.
    """
    random = np.random.default_rng(num_slots or count)
    delays = random.uniform(0, _SPREAD_S, count) + _SPREAD_S * (np.arange(count) // (num_slots or count))
    received = Received()
    for result in await asyncio.gather(*(speak(url, buffers, float(delay), first) for delay in delays)):
        for name, value in vars(result).items():
            setattr(received, name, getattr(received, name) + value)
    return received


async def speak(url: str, buffers: Sequence[bytes], delay: float, first: dict[Key, int]) -> Received:
    """After `delay` seconds, stream the buffers of one speaker in real time. Return the results."""
    received = Received(num_expected=len(first))
    await asyncio.sleep(delay)
    sent: list[float] = []
    try:
        async with connect(url, proxy=None, open_timeout=_LAST_WAIT_S, ping_timeout=None) as websocket:
            listening = asyncio.create_task(_listen(websocket, sent, first, received))
            try:
                begin = time.perf_counter()
                for number, buffer in enumerate(buffers):
                    due = begin + number * BUFFER_S
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    received.lags.append(time.perf_counter() - due)
                    sent.append(time.perf_counter())
                    await websocket.send(buffer)
                sent.append(time.perf_counter())
                await websocket.send("Done")
                async with asyncio.timeout(_LAST_WAIT_S):
                    await listening
            finally:
                listening.cancel()
    except (OSError, TimeoutError, WebSocketException) as error:
        code = getattr(getattr(error, "rcvd", None), "code", None)
        if code == 1013:
            return Received(num_refused=1)
        received.failures.append(f"{type(error).__name__}: {error}"[:200])
    return received


async def _listen(websocket: ClientConnection, sent: list[float], first: dict[Key, int], received: Received) -> None:
    seen: set[Key] = set()
    async for message in websocket:
        now = time.perf_counter()
        if message == "Done!":
            return
        key = key_of(message)
        if key in first and key not in seen:
            seen.add(key)
            number = min(first[key], len(sent) - 1)  # a result may arrive earlier than for a single speaker
            (received.finals if key[1] else received.partials).append(now - sent[number])


def key_of(message: str | bytes) -> Key:
    """Return the key of the result that a message contains."""
    result: dict[str, Any] = json.loads(message)
    return result["segment"], bool(result["is_final"]), result["text"]
