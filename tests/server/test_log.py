"""What an operator reads."""

import io
import re
import signal
from types import SimpleNamespace

import httpx
import pytest
import soundfile

from u2moe.runtime.errors import AudioError
from u2moe.runtime.server import errors, launch, log
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.options import ServerOptions

PATIENCE_S = 120
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) u2moe\.server: (.+)")
LIFE = (
    ("INFO", "listening at http"),
    ("INFO", "loaded"),
    ("INFO", "ready: 1 live streams at a time"),
    ("WARNING", "all places are taken"),
    ("WARNING", "broke its protocol"),
    ("WARNING", "sent or read too little"),
    ("INFO", "stopping"),
    ("INFO", "stopped"),
)


def close_code(client_of, url, *messages):
    """How the server ends a connection, once there is a place."""
    code = 1013
    while code == 1013:
        with client_of(url) as client:
            for message in messages:
                client.send(message)
            code = client.close_code()
    return code


def damaged_form():
    return {"content": b"--x\r\nno", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}


def without_length(samples):
    """A WAV file as a recorder writes it that does not know its end."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    data = bytearray(file.getvalue())
    data[40:44] = bytes(4)
    return bytes(data)


def test_the_life_of_a_server(serving, client_of, speech, expected):
    with serving("--capacity", "1", "--idle-timeout", "3") as process:
        address = process.urls[0].removeprefix("http://")
        url = f"ws://{address}/stream?api_key=secret-key"
        with client_of(url) as client:
            client.start(hotwords=["seventy"])
            for _ in range(3):
                with client_of(url) as refused:
                    assert refused.close_code() == 1013
            client.play(speech())
            client.finish()
        for content in (damaged_form(), {"files": {"file": ("live.wav", without_length(speech()))}}):  # leave no line
            httpx.post(f"http://{address}/v1/audio/transcriptions", trust_env=False, timeout=PATIENCE_S, **content)
        assert close_code(client_of, url, "secret-text") == 1008
        assert close_code(client_of, url) == 1008
        process.send_signal(signal.SIGTERM)
        said = process.said + process.communicate(timeout=PATIENCE_S)[1]
    first, *rest = said.splitlines()
    assert first.startswith("demo model")  # of the command, which a bundle silences
    lines = [LINE.fullmatch(line) for line in rest]
    assert all(lines), said
    assert len(lines) == len(LIFE), said
    for line, (level, part) in zip(lines, LIFE, strict=True):
        assert line[1] == level, said
        assert part in line[2], said
    secrets = {word for segment in expected().segments for word in segment.text.split()} | {"secret", "seventy"}
    assert not {word for word in secrets if word in said}


def test_what_clients_do_is_counted_each_time_and_logged_once_in_a_while(monkeypatch, caplog):
    times = iter((100.0, 101.0, 109.0, 111.0, 112.0, 130.0, 130.0))
    monkeypatch.setattr("u2moe.runtime.server.log.time", SimpleNamespace(monotonic=lambda: next(times)))
    metrics = Metrics()
    incidents = log.Incidents(metrics)
    for _ in range(6):
        incidents.refuse("full")
    incidents.fail(errors.IdleError("late"))
    assert (metrics.total("refusals", "full"), metrics.total("failures", "idle")) == (6, 1)
    full = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    refused = "refused a client: all places are taken"
    since = "more since the last such line"
    assert full == [refused, f"{refused} (2 {since})", f"{refused} (1 {since})"]
    assert "read too little for too long" in caplog.text


def test_each_refusal_and_failure_has_words(caplog):
    metrics = Metrics()
    incidents = log.Incidents(metrics)
    for reason in ("full", "stopping", "key", "origin"):
        incidents.refuse(reason)
    wrong = errors.RequestError("wrong"), errors.IdleError("late"), errors.TooLargeError("large"), AudioError("noise")
    for error in (*wrong, errors.RecognitionError("failed"), RuntimeError("a bug"), errors.StoppingError()):
        incidents.fail(error)
    kinds = ("request", "idle", "too_large", "recognition")
    assert [metrics.total("failures", kind) for kind in kinds] == [2, 1, 1, 2]
    assert len(caplog.records) == 8


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [({"host": "127.0.0.1"}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "k"}, False)],
)
def test_a_server_that_is_open_to_all_warns(options, is_warned, caplog):
    chosen = ServerOptions(port=0, **options)
    sockets = launch.open_sockets(chosen)
    caplog.set_level("INFO")
    launch._log_addresses(chosen, sockets)
    assert f"listening at http://{chosen.host}:{sockets['http'].getsockname()[1]}/" in caplog.text
    assert ("it has no API key" in caplog.text) == is_warned
    sockets["http"].close()
