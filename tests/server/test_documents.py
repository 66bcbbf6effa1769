"""Checks of the server's documentation: guide, OpenAPI document, and examples of deployment."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from u2moe.runtime import Result, cli
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.protocols import PROTOCOLS as TABLE

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
PROTOCOLS = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "server"


def blocks_of(language):
    """Return all code blocks of a language as (heading, code)."""
    found = []
    for section in PROTOCOLS.split("\n## ")[1:]:
        heading = section.partition("\n")[0].strip("`")
        found += [(heading, code) for code in re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)]
    return found


@pytest.fixture
def adapted(server, speech, talk, tmp_path, monkeypatch):
    """Return a function that makes code of the page use the tests' server, in a folder with a recording."""
    shutil.copy(talk, tmp_path)
    (tmp_path / "talk.raw").write_bytes(speech().tobytes())
    monkeypatch.chdir(tmp_path)
    return lambda code: code.replace(":8000", f":{server.ports['http']}").replace("10300", f"{server.ports['wyoming']}")


def test_each_protocol_has_an_example_also_with_curl(adapted, demo):
    assert len({heading for heading, _ in blocks_of("python")}) == len(TABLE)
    ((_, command),) = blocks_of("bash")
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(shlex.split(adapted(command)), capture_output=True, text=True, check=True)
    assert done.stdout.split() == demo.transcribe("talk.wav").text.split()


@pytest.mark.parametrize("page", [PROTOCOLS, GUIDE])
def test_tables_name_the_place_of_each_protocol(page):
    rows = page.partition("| clients of | where |")[2].partition("\n\n")[0]
    for protocol in TABLE.values():
        place = f"--protocol {protocol.name}=PORT" if protocol.run_tcp else protocol.path or "/v1/audio/transcriptions"
        assert f"{place}`" in rows


# Warnings of libraries when they are imported or connect.
@pytest.mark.filterwarnings("ignore:'audioop' is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:connect.* must be used as a context manager:DeprecationWarning")
@pytest.mark.parametrize(("heading", "code"), blocks_of("python"))
def test_the_examples_in_python(heading, code, adapted, speech, expected, demo, capsys):
    names = {}
    exec(compile(adapted(code), "docs/protocols.md", "exec"), names)
    said = capsys.readouterr().out
    if heading == "/stream":
        said = " ".join(asyncio.run(names["recognise"](speech())))
    wanted = demo.transcribe("talk.wav") if heading == "OpenAI, files" else expected()
    assert said.split() == wanted.text.split()


def test_the_example_in_javascript(adapted, expected, tmp_path):
    ((_, code),) = blocks_of("javascript")
    node = ["node", "--experimental-websocket"]
    if shutil.which("node") is None or subprocess.run([*node, "-v"], capture_output=True, check=False).returncode:
        pytest.skip("needs Node 20.10 or newer")
    use = """
    const bytes = require("fs").readFileSync("talk.raw");
    const samples = new Int16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
    const blocks = [];
    for (let start = 0; start < samples.length; start += 1600) blocks.push(samples.slice(start, start + 1600));
    const partials = [];
    const show = (segments) => console.log(JSON.stringify({ segments, partials }));
    recognise(blocks, (text) => partials.push(text)).then(show);
    """
    (tmp_path / "example.js").write_text(adapted(code) + use, encoding="utf-8")
    done = subprocess.run([*node, "example.js"], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["segments"] == [segment.text for segment in expected().segments]
    assert found["partials"]


def test_the_guide_and_openapi_name_all_options_fields_and_metrics(server):
    rows = PROTOCOLS.partition("| field |")[2].partition("\n\n")[0].splitlines()
    fields = [name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(fields) == sorted(Result.__dataclass_fields__)
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().text(), re.MULTILINE)) - {"u2moe_ready"}
    assert {f"`{name}`" for name in metrics} <= set(re.findall(r"`u2moe_\w+`", GUIDE))
    document = server.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            answer = server.get(path) if method == "get" else None
            assert answer is None or str(answer.status_code) in operations[method]["responses"], path
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
    form = document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]
    properties = form["schema"]["properties"]
    assert {"file", "prompt", "response_format", "stream", *REQUEST_OPTIONS} < properties.keys()
    assert (properties["beam_size"]["minimum"], properties["beam_size"]["maximum"]) == (1, 40)


def served(arguments):
    """Return the parsed arguments of `u2moe`."""
    return cli.parser(arguments).parse_args(arguments)


def test_the_image_its_healthcheck_and_the_systemd_unit(server, tmp_path):
    """The server is process 1, not the child of a shell that would swallow SIGTERM, and does not run as root."""
    text = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    stage = re.split(r"^FROM ", lines, flags=re.MULTILINE)[-1].partition("\n")[2]  # the last one
    found = dict(line.split(maxsplit=1) for line in stage.splitlines() if line)
    assert json.loads(found["ENTRYPOINT"]) == ["u2moe"]
    args = served(json.loads(found["CMD"]))
    assert args.host == "0.0.0.0"
    assert found["EXPOSE"] == str(args.port)
    assert int(found["USER"]) > 0
    assert found["STOPSIGNAL"] == "SIGTERM"
    options, _, check = found["HEALTHCHECK"].partition(" CMD ")
    assert {option.partition("=")[0] for option in options.split()} == {"--start-period", "--interval", "--timeout"}
    check = json.loads(check)
    assert f"http://127.0.0.1:{args.port}/readyz" in check[-1]
    for url, is_well in ((server.url, True), ("http://127.0.0.1:9", False)):
        command = [sys.executable, check[1], check[2].replace("http://127.0.0.1:8000", url)]
        assert (subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0) == is_well
    unit = EXAMPLES / "u2moe.service"
    text = unit.read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])
    args = served(command[1:])
    assert (args.drain_s or ServerOptions().drain_s) < int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    mine = tmp_path / unit.name
    mine.write_text(text.replace(command[0], "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(mine)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
