"""Is the page of a static host ready within two seconds, and is its memory flat over an hour of microphone?

    python examples/browser/make_site.py build/site
    python -m u2moe.benchmarks.studies.page build/site [--ready] [--minutes 60] [--results FILE]

Needs the system's Chromium. `--ready` opens the page in browsers with empty caches and takes the time from the start of
navigation until the page says that it is ready. `--minutes` lets a microphone play the demo model's clips again and
again, and reads the resident memory of the page's process each minute.
"""

from __future__ import annotations

import functools
import http.server
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.host import status_bytes
from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.benchmarks.results.provenance import measured, measured_here
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.process import write_wav
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.places import DEMO_FOLDER

RATE = 48_000
PAUSE_S = 1.5
REPETITIONS = 5
TENTH = 10
"""Memory may grow during the first tenth of the time."""
_MINUTE_MS = 60_000
_PATIENCE_MS = 120_000
_NOTE_WHEN_READY = """new MutationObserver(() => {
  if (document.body?.classList.contains('ready')) window.readyMs ??= performance.now();
}).observe(document, { subtree: true, childList: true, attributes: true });"""


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _host(folder: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Silent, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def _opened(url: str, *arguments: str) -> Iterator[tuple[Any, Any]]:
    """A browser with an empty cache, and its page at `url` once that is ready."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only what measures needs it

    program = which("chromium") or which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *arguments])
        page = browser.new_context(permissions=["microphone"]).new_page()
        page.add_init_script(_NOTE_WHEN_READY)
        page.goto(url)
        page.wait_for_function("window.readyMs", timeout=_PATIENCE_MS)
        for event in ("crash", "framedetached", "framenavigated"):  # a page has lost its frame once, nobody knows why
            page.on(event, lambda *_, event=event: report(f"the page has met {event}"))
        yield browser, page
        browser.close()


def _processes(browser: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return found


def measure_ready(url: str) -> list[dict[str, float]]:
    """Of each of several starts, the seconds `ready` and the processor time of all the browser's processes in `cpu`."""
    starts = []
    for _ in range(REPETITIONS):
        with _opened(url) as (browser, page):
            cpu = sum(process["cpuTime"] for process in _processes(browser))
            starts.append({"ready": round(page.evaluate("readyMs") / 1000, 3), "cpu": round(cpu, 2)})
        report(f"ready after {starts[-1]['ready']} s, {starts[-1]['cpu']} s of processors")
    return starts


def measure_microphone(url: str, minutes: int) -> dict[str, Any]:
    """After each minute the resident memory of the page's process in `mb` and the number of segments.

    Raises:
        RuntimeError: the page has a problem, or no longer recognises anything.
    """
    pause = np.zeros(int(PAUSE_S * RATE), np.float32)
    clips = [part for item in read_recordings(DEMO_FOLDER / "clips" / "transcripts.txt")
             for part in (read_audio(item.path, RATE), pause)]  # fmt: skip
    minute: dict[str, list[int]] = {"mb": [], "segments": []}
    with tempfile.TemporaryDirectory() as folder:
        file = write_wav(Path(folder) / "speech.wav", np.concatenate(clips), RATE)
        fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
        with _opened(url, *fake, f"--use-file-for-fake-audio-capture={file}") as (browser, page):
            page.click("#microphone")
            for number in range(minutes):
                page.wait_for_timeout(_MINUTE_MS)
                renderers = [process["id"] for process in _processes(browser) if process["type"] == "renderer"]
                minute["mb"].append(round(max(status_bytes("VmRSS", pid) or 0 for pid in renderers) / 1e6))
                minute["segments"].append(page.locator("#segments li").count())
                report(f"minute {number + 1}: {minute['mb'][-1]} MB, {minute['segments'][-1]} segments")
                problem = page.locator("#problem").text_content()
                if problem or minute["segments"][-1] <= ([0, *minute["segments"]])[-2]:
                    raise RuntimeError(f"after {number + 1} minutes: {problem or 'no new segment'}")
    return minute


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Limits of the time until the page is ready, and of the growth of its memory."""
    if ready := results.get("ready"):
        found = statistics.median(start["ready"] for start in ready["starts"])
        yield Target(name="the page is ready, empty cache", found=found, limit=2.0, at_most=True, unit=" s")
    if microphone := results.get("microphone"):
        name = f"memory of the page after {len(microphone['mb'])} minutes of microphone / after a tenth of them"
        yield Target(name=name, found=growth(microphone["mb"]), limit=1.1, at_most=True)


def growth(mb: Sequence[int]) -> float:
    """The median of the last tenth of the minutes over that of the second tenth."""
    tenth = max(len(mb) // TENTH, 1)
    return round(statistics.median(mb[-tenth:]) / statistics.median(mb[tenth : 2 * tenth]), 3)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for the pages, where the other part is not measured, too."""
    parts = {
        "ready": ("ready", "cpu", "measured"),
        "microphone": ("minutes", "segments", "tenth", "end", "most", "measured"),
    }
    shown = {f"{part}.{key}": "(not measured)" for part, keys in parts.items() for key in keys}
    if ready := results.get("ready"):
        median = {name: statistics.median(start[name] for start in ready["starts"]) for name in ("ready", "cpu")}
        shown |= {f"ready.{name}": f"{value:.2f}" for name, value in median.items()}
        shown["ready.measured"] = measured(ready)
    if microphone := results.get("microphone"):
        mb = microphone["mb"]
        shown |= {"microphone.minutes": str(len(mb)), "microphone.segments": str(microphone["segments"][-1])}
        shown |= {"microphone.tenth": str(mb[len(mb) // TENTH - 1]), "microphone.end": str(mb[-1])}
        shown |= {"microphone.most": str(max(mb)), "microphone.measured": measured(microphone)}
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.page", __doc__)
    parser.add_argument("site", type=Path, help="folder that examples/browser/make_site.py has written")
    parser.add_argument("--ready", action="store_true", help="measure the time until the page is ready")
    parser.add_argument("--minutes", type=int, default=0, help="minutes of microphone")
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results; the other part is kept")
    args = parser.parse_args(arguments)
    content = read_json(args.results) if args.results else {}
    with _host(args.site) as url:
        if args.ready:
            content["ready"] = {**measured_here(), "starts": measure_ready(url)}
        if args.minutes:
            content["microphone"] = {**measured_here(), **measure_microphone(url, args.minutes)}
    if args.results:
        write_json(args.results, content)
    print("\n".join(f"{key}: {value}" for key, value in values(content).items()))


if __name__ == "__main__":
    run_script(main)
