"""What is written about the server holds: its guide, its OpenAPI document, and the examples of how to run it."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile

from u2moe.runtime import cli
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.protocols.live import StreamRequest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "server"


def test_the_code_of_the_guide_runs(server, speech, expected, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    monkeypatch.chdir(tmp_path)
    with_openai, with_websockets = (
        block.replace("127.0.0.1:8000", f"127.0.0.1:{server.ports['http']}")
        for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    )
    exec(compile(with_openai, "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    names = {}
    exec(compile(with_websockets, "docs/serve.md", "exec"), names)
    assert asyncio.run(names["recognise"](speech())) == [segment.text for segment in expected().segments]


def test_the_guide_names_all_options_and_metrics():
    rows = GUIDE.partition("| option |")[2].partition("\n\n")[0]
    options = re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)
    assert options == list(StreamRequest.__dataclass_fields__)
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().text(), re.MULTILINE)) - {"u2moe_ready"}
    assert {f"`{name}`" for name in metrics} <= set(re.findall(r"`u2moe_\w+`", GUIDE))


def test_openapi(server):
    document = server.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            answer = server.get(path) if method == "get" else None
            assert answer is None or str(answer.status_code) in operations[method]["responses"], path
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]
    form = document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert {"file", "prompt", "response_format", "stream"} < form["schema"]["properties"].keys()


def served(arguments):
    """What the command line makes of the arguments of `u2moe`."""
    return cli._parser(arguments[0]).parse_args(arguments)


def test_the_dockerfile():
    text = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    args = served(json.loads(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)[1]))
    assert f"EXPOSE {args.port}" in text
    assert f"127.0.0.1:{args.port}/readyz" in text
    assert "\nUSER 10001\n" in text
    assert "HEALTHCHECK" in text


def test_the_systemd_unit(tmp_path):
    unit = EXAMPLES / "u2moe.service"
    text = unit.read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])
    args = served(command[1:])
    assert args.drain_timeout < int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    mine = tmp_path / unit.name
    mine.write_text(text.replace(command[0], "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(mine)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
