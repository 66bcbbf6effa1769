"""Servers in processes of their own: ours, and sherpa-onnx's streaming WebSocket server. Both speak its protocol."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.benchmarks.studies.shared.programs import make_environment, sherpa_graphs
from u2moe.export.sherpa_graphs import ONLINE
from u2moe.runtime.bundle.manifest import TOKENS_FILE
from u2moe.runtime.model.native import VARIABLE

OURS, OURS_NATIVE, THEIRS = "u2moe", "u2moe with native kernels", "sherpa-onnx"
REQUIREMENTS = ("sherpa-onnx-bin==2.0.1", "sherpa-onnx-core==2.0.1")
NO_LIMIT = 100_000
_START_S = 900.0
"""A large model takes minutes to load, and to take its memory, on a busy machine."""
_STOP_S = 30.0


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that takes connections.

    Attributes:
        port: on the loopback address.
        path: where it speaks sherpa-onnx's protocol.
        pid: of its process.
        capacity: live streams that it says it takes; None: it does not say.
    """

    port: int
    path: str
    pid: int
    capacity: int | None = None

    @property
    def url(self) -> str:
        """Where to connect."""
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
    """`u2moe serve`, on some cores.

    Args:
        bundle: folder of a bundle.
        capacity: live streams that it takes; None: as many as it measures.
        cores: that it may use, as taskset(1) takes them; None: all.
        kernels: what computes the functions of the graphs.
        arguments: further ones.
    """
    port = free_port()
    command = ["env", f"{VARIABLE}={kernels}", sys.executable, "-m", "u2moe", "serve", str(bundle)]
    command += ["--port", str(port), *arguments]
    command += [] if capacity is None else ["--capacity", str(capacity)]
    with _process(command, cores, until="live streams at a time\n") as (process, said):
        words = next((line.split() for line in said.splitlines() if "live streams" in line), [])
        found = int(words[words.index("live") - 1]) if words else None
        yield RunningServer(port=port, path="/sherpa", pid=process.pid, capacity=found)


@contextlib.contextmanager
def sherpa_server(bundle: Path, folder: Path, *, cores: str | None = None) -> Iterator[RunningServer]:
    """sherpa-onnx's server with graphs of the same weights; `folder` keeps these and its installation."""
    folder = folder.resolve()
    environment = make_environment(folder / "sherpa-onnx-bin", REQUIREMENTS)
    graphs = sherpa_graphs(bundle, folder / "graphs" / bundle.name)
    port = free_port()
    command = [
        str(Path(environment["python"]).with_name("sherpa-onnx-online-websocket-server")),
        f"--wenet-ctc-model={graphs / ONLINE.file}",
        f"--wenet-ctc-chunk-size={CHUNK_SIZE}",
        f"--wenet-ctc-num-left-chunks={NUM_LEFT_CHUNKS}",
        f"--tokens={graphs / TOKENS_FILE}",
        f"--port={port}",
        "--num-work-threads=1",
        "--max-batch-size=32",
    ]
    # It writes a log.txt into the folder that it is started in.
    with _process(command, cores, port=port, folder=folder) as (process, _):
        yield RunningServer(port=port, path="/", pid=process.pid)


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process and its children have used; of Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_s(int(child)) for child in children)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(
    command: Sequence[str],
    cores: str | None,
    *,
    until: str | None = None,
    port: int | None = None,
    folder: Path | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that has said something, or listens at a port; and all that it said so far."""
    command = [*(["taskset", "-c", cores] if cores else []), *command]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)  # noqa: S603 - one of two servers
        try:
            deadline = time.monotonic() + _START_S
            while True:
                said = Path(log.name).read_text(encoding="utf-8", errors="replace")
                if (until is not None and until in said) or (port is not None and _listens(port)):
                    break
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


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
