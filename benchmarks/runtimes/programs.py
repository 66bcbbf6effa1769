"""Recognise WAV files of one channel in each runtime: in this process, in Node, in Chromium and by the C++ program."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import json
import runpy
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.benchmarks.results.files import repository
from u2moe.benchmarks.runtimes.python_program import CHUNK_SIZE, LEFT_CHUNKS, STREAM, Samples, recognized
from u2moe.benchmarks.runtimes.segments import Segment, of_json, of_python
from u2moe.export.profiles.conversion import ONE_FILE_LIMIT
from u2moe.export.profiles.graphs import samples_per_frame, streaming_graph, window_samples
from u2moe.export.profiles.parity import session_of
from u2moe.runtime import Bundle, Recognizer
from u2moe.runtime.audio.padding import Padding
from u2moe.runtime.decoding.ctc import PrefixBeamSearch
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.encoder import required_cache_size

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

Found = list[list[Segment]]


def in_python(bundle: Path, recordings: Sequence[Samples], *, endpoint: bool = True) -> Found:
    """By streams of the runtime."""
    options = STREAM if endpoint else dataclasses.replace(STREAM, endpoint=None)
    recognizer = Recognizer.from_pretrained(bundle, options=options)
    return [[of_python(segment) for segment in recognized(recognizer, samples)] for samples in recordings]


def in_one_graph(bundle: Path, recordings: Sequence[Samples]) -> Found:
    """The profile `streaming` with our searches: each recording is one utterance."""
    opened = Bundle.open(bundle)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "streaming.onnx"
        save_graph(streaming_graph(opened), file, limit=ONE_FILE_LIMIT)
        run = session_of(file)
    found = (_in_one_graph(opened, run, samples.astype(np.float32) / np.float32(32768)) for samples in recordings)
    return [[segment] if segment["text"] else [] for segment in found]


def _in_one_graph(bundle: Bundle, run: Callable[..., Any], samples: npt.NDArray[np.float32]) -> Segment:
    manifest, config = bundle.manifest, bundle.manifest.model
    model = _loaded(bundle.path)
    padding = Padding(manifest.padding_s, manifest.features.sample_rate, manifest.features.frame_len)
    end_s = len(samples) * 1000 // manifest.features.sample_rate / 1000
    samples = np.concatenate([padding.accept(samples), padding.finish()])
    lead_s = round(padding.num_before / manifest.features.sample_rate, 3)
    start = model.encoder.start()
    state = {"offset": start.offset, "att_cache": start.att, "cnn_cache": start.cnn}
    step, shortest = samples_per_frame(manifest), window_samples(manifest)
    search, outputs = PrefixBeamSearch(10, config.blank), [np.zeros((0, config.output_size), np.float32)]
    required = np.array(required_cache_size(CHUNK_SIZE, LEFT_CHUNKS))
    for begin in range(0, len(samples) - shortest + 1, CHUNK_SIZE * step):
        window = samples[begin : begin + (CHUNK_SIZE - 1) * step + shortest]
        found = run({"samples": window[np.newaxis], "required_cache_size": required, **state})
        state = {"offset": found["next_offset"], "att_cache": found["r_att_cache"], "cnn_cache": found["r_cnn_cache"]}
        search.advance(found["log_probs"][0])
        outputs.append(found["encoder_out"][0])
    search.finish()
    hypotheses, output = search.hypotheses(), np.concatenate(outputs)
    if not len(output):
        return {"text": "", "tokens": [], "times": [], "words": [], "nbest": [], "score": 0.0}
    scores = model.token_scores(output, [item.tokens for item in hypotheses])
    weights = manifest.decoding
    ranked = attention_rescoring(hypotheses, scores, weights.ctc_weight, weights.reverse_weight)
    frame_s = manifest.frame_s
    nbest: dict[str, list[int]] = {}
    for item in ranked:
        nbest.setdefault(bundle.vocabulary.text(item.hypothesis.tokens), item.hypothesis.tokens)
    best = ranked[0].hypothesis
    return {
        "text": bundle.vocabulary.text(best.tokens),
        "tokens": best.tokens,
        "times": [round(min(max(time * frame_s - lead_s, 0.0), end_s), 3) for time in best.times],
        "words": [],
        "nbest": list(nbest.values()),
        "score": ranked[0].score,
    }


@functools.lru_cache(maxsize=1)
def _loaded(path: Path) -> Any:
    return Bundle.open(path).load()


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
