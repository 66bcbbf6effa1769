"""Recordings in each runtime: in this process, in Node, in Chromium and by the C++ program; and segments as data."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import runpy
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from u2moe.benchmarks.results.files import repository
from u2moe.benchmarks.studies.shared.python_program import CHUNK_SIZE, LEFT_CHUNKS, STREAM, Samples, recognized
from u2moe.runtime import Recognizer, Result

_MAIN = """async ({ bundle, files, options }) => {
  const { Recognizer } = await import('./u2moe/index.js');
  const ort = await import('./ort/ort.wasm.bundle.min.mjs');
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL('./ort/ort-wasm-simd-threaded.wasm', location.href).href };
  const recognizer = await Recognizer.fromBundle(bundle, { ort, cache: null });
  const found = [];
  for (const file of files) {
    const samples = new Int16Array(await (await fetch(file)).arrayBuffer());
    found.push(await recognizer.transcribe(samples, recognizer.sampleRate, options));
  }
  await recognizer.release();
  return found;
}"""

Segment = Mapping[str, Any]
"""`text`, `tokens`, `times`, `words` as (word, start, end), `nbest` as tokens of each, `score`."""
Found = list[list[Segment]]


def of_python(result: Result) -> Segment:
    """A segment from a result of the Python runtime."""
    return {
        "text": result.text,
        "tokens": result.tokens,
        "times": result.times,
        "words": [[word.word, word.start, word.end] for word in result.words],
        "nbest": [item.tokens for item in result.nbest],
        "score": result.score,
    }


def of_json(item: Mapping[str, Any]) -> Segment:
    """A segment from what the programs in other languages print."""
    return {
        "text": item["text"],
        "tokens": item["tokens"],
        "times": item["times"],
        "words": [[word["word"], word["start"], word["end"]] for word in item["words"]],
        "nbest": [alternative["tokens"] for alternative in item["nbest"]],
        "score": item["nbest"][0]["score"],
    }


def in_python(bundle: Path, recordings: Sequence[Samples]) -> Found:
    """By streams of the runtime."""
    recognizer = Recognizer.from_pretrained(bundle, options=STREAM)
    return [[of_python(segment) for segment in recognized(recognizer, samples)] for samples in recordings]


def node_command(bundle: Path, runtime: str) -> list[str]:
    """examples/browser/transcribe.mjs with onnxruntime-node ("node") or onnxruntime-web ("web"); add the files."""
    options = json.dumps({"chunkSize": CHUNK_SIZE, "numLeftChunks": LEFT_CHUNKS})
    return ["node", "transcribe.mjs", "--json", "--runtime", runtime, "--options", options, str(bundle.resolve())]


def node_folder() -> Path:
    """Where that command must run."""
    return repository() / "examples" / "browser"


def in_node(bundle: Path, files: Sequence[Path], runtime: str) -> Found:
    """By that command."""
    command = [*node_command(bundle, runtime), *map(str, files)]
    done = subprocess.run(command, cwd=node_folder(), capture_output=True, text=True, check=True)  # noqa: S603
    return [[of_json(segment) for segment in json.loads(line)["segments"]] for line in done.stdout.splitlines()]


def cpp_command(program: str, bundle: Path) -> list[str]:
    """The program of examples/cpp, or a command that runs it in an emulator; add the files."""
    return [*shlex.split(program), "--json", "--left-chunks", str(LEFT_CHUNKS), str(bundle)]


def in_cpp(program: str, bundle: Path, files: Sequence[Path]) -> Found:
    """By that command."""
    command = [*cpp_command(program, bundle), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    segments = [json.loads(line) for line in done.stdout.splitlines()]
    return [[of_json(segment) for segment in segments if segment["file"] == str(file)] for file in files]


def in_chromium(bundle: Path, recordings: Sequence[Samples], folder: Path) -> tuple[Found, str]:
    """By the module in a page of Chromium, from a static host; also the browser's version."""
    site = folder / "site"
    make_site(site, bundle)
    for number, samples in enumerate(recordings):
        (site / f"{number}.pcm").write_bytes(samples.tobytes())
    names = [f"{number}.pcm" for number in range(len(recordings))]
    options = {"chunkSize": CHUNK_SIZE, "numLeftChunks": LEFT_CHUNKS}
    with host(site) as url, chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(0)
        page.goto(f"{url}favicon.svg")  # nothing else runs here
        found = page.evaluate(_MAIN, {"bundle": f"{url}model/", "files": names, "options": options})
        return [[of_json(segment) for segment in segments] for segments in found], browser.version


def make_site(site: Path, bundle: Path) -> None:
    """Put the page together; see examples/browser/make_site.py."""
    runpy.run_path(str(repository() / "examples" / "browser" / "make_site.py"))["make_site"](site, bundle)


@contextlib.contextmanager
def host(folder: Path, *, max_age: int | None = None) -> Iterator[str]:
    """A static host for a folder, with its URL. It lets browsers keep answers for `max_age` seconds without asking."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def end_headers(self) -> None:
            if max_age is not None:
                self.send_header("Cache-Control", f"max-age={max_age}")
            super().end_headers()

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def find_chromium() -> str | None:
    """The system's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def fake_microphone(file: Path, *, again: bool = False) -> list[str]:
    """Arguments for Chromium: a microphone that plays a WAV file once or again and again, and that pages are given."""
    return [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={file}{'' if again else '%noloop'}",
        "--autoplay-policy=no-user-gesture-required",
    ]


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """The system's Chromium, without a window.

    Raises:
        FileNotFoundError: there is none.
    """
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - the other runtimes do without

    executable = find_chromium()
    if executable is None:
        raise FileNotFoundError("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()


def write_wav(folder: Path, recordings: Sequence[Samples], rate: int) -> list[Path]:
    """The recordings as 16-bit WAV files."""
    files = [folder / f"{number}.wav" for number in range(len(recordings))]
    for file, samples in zip(files, recordings, strict=True):
        soundfile.write(file, samples, rate, subtype="PCM_16")
    return files
