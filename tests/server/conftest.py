"""A server in a thread of this process, speech that clients send, and its transcript by `transcribe`."""

import contextlib
import functools
import json
import re
import socket
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest
import soundfile
from dialects import PATIENCE_S, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from u2moe.runtime import ContextGraph, DecodingOptions, EndpointConfig, Recognizer
from u2moe.runtime.audio.arrays import convert
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.server import models
from u2moe.runtime.server.launch import open_sockets, run_in_loop
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.protocols import PROTOCOLS, rest
from u2moe.runtime.server.server import Server
from u2moe.runtime.server.service import Service

rest._SILENCE_S = PATIENCE_S  # otherwise responses begin early, before an error is known
models._MEASURED_S = 0.5  # the start of a server would take longest
STREAMING = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())


@pytest.fixture(scope="session")
def demo():
    return Recognizer.from_pretrained()


@functools.cache
def make_speech(sample_rate=16_000):
    clips = [read_audio(DEMO_FOLDER / "clips" / f"{name}.flac", 16_000) for name in ("command", "question", "command")]
    pause = np.zeros(24_000, np.float32)
    samples = np.concatenate([part for clip in clips for part in (clip, pause)])
    resampled = np.concatenate(list(convert(samples, 16_000, sample_rate)))
    return np.clip(resampled * 32768, -32768, 32767).astype(np.int16)


@pytest.fixture(scope="session")
def speech():
    """Return a function from a sample rate to int16 speech of three people with pauses, which has several segments."""
    return make_speech


@pytest.fixture(scope="session")
def talk(tmp_path_factory):
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, make_speech(), 16_000)
    return file


@pytest.fixture(scope="session")
def expected(demo):
    """Return a function from a sample rate to the streamed transcript of `speech` at that rate."""

    @functools.cache
    def transcript(sample_rate=16_000):
        return demo.transcribe(make_speech(sample_rate), sample_rate, options=STREAMING)

    return transcript


@pytest.fixture(scope="session")
def texts(expected):
    return [segment.text for segment in expected().segments]


class Client:
    """A WebSocket that sends and receives JSON, and audio in blocks."""

    def __init__(self, websocket):
        self.websocket = websocket
        self.send = websocket.send

    def tell(self, **values):
        self.websocket.send(json.dumps(values))

    def play(self, samples, block_len=4000):
        for start in range(0, len(samples), block_len):
            self.websocket.send(samples[start : start + block_len].tobytes())

    def receive(self):
        return json.loads(self.websocket.recv(PATIENCE_S))

    def receive_until(self, *kinds):
        events = []
        while not events or events[-1]["type"] not in kinds:
            events.append(self.receive())
        return events

    def wait_for_text(self):
        while not (event := self.receive())["text"]:
            assert event["type"] == "partial"

    def rest(self, last=None):
        """Return all messages until the server closes the connection, or up to the message `last`."""
        messages = []
        with contextlib.suppress(ConnectionClosed):
            while not messages or messages[-1] != last:
                messages.append(self.websocket.recv(PATIENCE_S))
        return messages

    def close_code(self):
        self.rest()
        return self.websocket.close_code

    def start(self, **options):
        self.tell(**options)
        ready = self.receive()
        assert ready["type"] == "ready", ready

    def finish(self):
        """End the conversation and return all remaining events."""
        self.tell(type="finish")
        return self.receive_until("done", "error")


@contextlib.contextmanager
def open_client(url, **settings):
    settings = {"open_timeout": PATIENCE_S, "close_timeout": PATIENCE_S, "proxy": None, **settings}
    with connect(url, **settings) as websocket:
        yield Client(websocket)


@pytest.fixture(scope="session")
def client_of():
    return open_client


class RunningServer:
    """A server in a thread. `stop` has the effect of SIGTERM."""

    wait_until = staticmethod(wait_until)

    def __init__(self, recognizer, options):
        self.sockets = open_sockets(options, contextlib.ExitStack())
        self.ports = {speaks: listening.getsockname()[1] for speaks, listening in self.sockets.items()}
        self.url = f"http://127.0.0.1:{self.ports['http']}"
        self.websocket_url = self.url.replace("http", "ws")
        recognizers = recognizer if isinstance(recognizer, dict) else {recognizer.bundle.path.name: recognizer}
        self.service = Service(recognizers, options, Metrics(tuple(PROTOCOLS)))
        self.is_ready = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.is_ready.wait(PATIENCE_S)

    def _run(self):
        async def run():
            self.server = Server(self.service, self.is_ready.set)
            await self.server.run_on(self.sockets)

        run_in_loop(run())

    def stop(self):
        with contextlib.suppress(RuntimeError):  # it has already ended
            self.service.scheduler._loop.call_soon_threadsafe(self.server.stop)

    def kill(self):
        """Stop as if the machine were switched off: no connection is closed properly."""
        cut = threading.Event()

        def cut_all():
            self.server.close_sockets()
            for served in list(self.server.served):
                served.abort()
            cut.set()

        self.service.scheduler._loop.call_soon_threadsafe(cut_all)
        assert cut.wait(PATIENCE_S)
        self.stop()
        self.join()

    def join(self):
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    def connect(self, path="/stream", *, port=None, **settings):
        url = self.websocket_url if port is None else f"ws://127.0.0.1:{port}"
        return open_client(f"{url}{path}", **settings)

    def open_plain(self, speaks="http"):
        return socket.create_connection(("127.0.0.1", self.ports[speaks]), PATIENCE_S)

    def answer(self, sent, speaks="http"):
        """Send bytes, and return everything received until the server closes the connection."""
        with self.open_plain(speaks) as plain:
            plain.sendall(sent)
            return b"".join(iter(lambda: plain.recv(10_000), b""))

    def get(self, path, **settings):
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE_S, trust_env=False, **settings)

    def post(self, **content):
        url = f"{self.url}/v1/audio/transcriptions"
        return httpx.post(url, **{"trust_env": False, "timeout": PATIENCE_S, **content})

    def recognised(self, samples, block_len=4000, **options):
        with self.connect() as client:
            client.start(**options)
            client.play(samples, block_len)
            return client.finish()

    def metric(self, name, label=None):
        return self.service.metrics.total(name, label)

    def wait_until_empty(self):
        self.wait_until(lambda: self.metric("streams") == 0 and self.metric("files") == 0)
        self.wait_until(lambda: not self.service.scheduler.streams)


@pytest.fixture(scope="session")
def running(demo):
    """Return a function that starts a server with options. It runs until its context or the test session ends."""

    @contextlib.contextmanager
    def run(recognizer=demo, **options):
        server = RunningServer(recognizer, ServerOptions(**{"port": 0, "capacity": 8, "drain_s": 20, **options}))
        try:
            yield server
        finally:
            server.stop()
            server.join()

    return run


class HeldRecognizer:
    """A recogniser whose work waits for `release`, except for the work of a server before it is ready."""

    def __init__(self, recognizer):
        self._recognizer = recognizer
        self.is_held, self.may_go_on, self.failure = threading.Event(), threading.Event(), None
        self.release = self.may_go_on.set

    def __getattr__(self, name):
        return getattr(self._recognizer, name)

    def decode_streams(self, streams):
        if threading.current_thread().name == "u2moe-scheduler":
            self._wait()
        self._recognizer.decode_streams(streams)

    def segments(self, *args, **kwargs):
        self._wait()
        return self._recognizer.segments(*args, **kwargs)

    def _wait(self):
        self.is_held.set()
        assert self.may_go_on.wait(PATIENCE_S)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


@pytest.fixture
def held(demo):
    recognizer = HeldRecognizer(demo)
    yield recognizer
    recognizer.release()


@contextlib.contextmanager
def start_process(*options, before="", early=None):
    """Start `u2moe serve` on free ports after code `before`, and yield it when it is ready, with `said`, `urls` and the
    function `read_to`. The signal `early` is sent during the start. It is killed at the end if it still runs."""
    before += f"\nfrom u2moe.runtime.server import models\nmodels._MEASURED_S = {models._MEASURED_S}"
    code = f"{before}\nfrom u2moe.runtime.cli import main\nraise SystemExit(main())"
    command = [sys.executable, "-c", code, "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:

        def read_to(text):
            line = ""
            while text not in line:
                process.said += (line := process.stderr.readline())
                assert line or process.poll() is None, process.said

        process.said, process.read_to = "", read_to
        try:
            if early is not None:
                read_to("listening")
                process.send_signal(early)
            read_to("ready: ")
            process.urls = [f"http://{place}" for place in re.findall(r"://(127.0.0.1:\d+)", process.said)]
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="session")
def serving():
    return start_process


@pytest.fixture
def assert_hotwords(monkeypatch, demo):
    """Return a function that checks the hotwords of the last stream. The search ignores them to save time."""
    make, given = Recognizer._stream, []
    monkeypatch.setattr(
        Recognizer,
        "_stream",
        lambda self, options, size, hotwords: given.append(hotwords) or make(self, options, size, None),
    )

    def check(*phrases):
        assert vars(given[-1]) == vars(ContextGraph(phrases, demo.vocabulary))

    return check


@pytest.fixture(scope="session")
def server(running):
    ports = {name: 0 for name, each in PROTOCOLS.items() if each.may_have_port}
    with running(capacity=50, protocol_ports=ports) as server:
        yield server
