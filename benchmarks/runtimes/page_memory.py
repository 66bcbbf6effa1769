"""Does the page of examples/browser take the same memory however long somebody speaks? Called by `runtimes.speed`.

The page is that which people use: its microphone, transcript and sound. In real time the browser's microphone plays a
file again and again. Else the blocks that a microphone would give come as fast as they are recognised, and garbage is
collected before each measurement, since the browser has no idle time for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from u2moe.benchmarks.runtimes import programs
from u2moe.benchmarks.runtimes.equality import recordings_of

DEVICE_RATE = 48_000
_NUM_SAMPLES = 12
_REPEATS = 3
_TALK = "talk.pcm"
_FAST_MICROPHONE = """(() => {
  // The page's own code takes blocks from this instead of an audio worklet, and samples on their way are counted.
  window.waiting = 0;
  window.AudioWorkletNode = class { constructor() { this.port = {}; window.microphone = this.port; } };
  AudioContext.prototype.createMediaStreamSource = () => ({ connect() {} });
  window.Worker = class extends Worker {
    constructor(...options) {
      super(...options);
      this.addEventListener('message', ({ data }) => { if (data.type === 'taken') window.waiting -= data.length; });
    }
    postMessage(message, transfer) {
      if (message.type === 'audio') window.waiting += message.samples.length;
      super.postMessage(message, transfer);
    }
  };
})()"""
_SPEAK = """async ({ file, rate, seconds }) => {
  const talk = new Int16Array(await (await fetch(file)).arrayBuffer());
  for (window.fed = 0; window.fed < seconds; window.fed += 1) {
    const start = (window.fed % Math.floor(talk.length / rate)) * rate;
    const block = Float32Array.from(talk.subarray(start, start + rate), (value) => value / 32768);
    window.microphone.onmessage({ data: block });
    while (window.waiting > 160000) await new Promise((resolve) => setTimeout(resolve, 20));
  }
}"""


def memory_of_page(
    bundle: Path, minutes: int, progress: Callable[[str], None] = lambda _: None, *, real_time: bool = False
) -> dict[str, Any]:
    """Memory of the browser's process for the page, while somebody speaks.

    Args:
        bundle: the model.
        minutes: of speech.
        progress: called with a line for each measurement.
        real_time: by the browser's own microphone.

    Returns:
        `minutes`, `real_time`, `num_segments`, and `samples`: pairs of minutes and MB. MB are private memory and the
        share of shared memory.
    """
    recordings = recordings_of([], None, DEVICE_RATE)
    pause = np.zeros(DEVICE_RATE * 3 // 2, np.int16)
    talk = np.tile(np.concatenate([part for each in recordings for part in (each, pause)]), _REPEATS)
    samples: list[tuple[float, float]] = []
    step = max(minutes / _NUM_SAMPLES, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        site, sound = Path(folder) / "site", Path(folder) / "talk.wav"
        programs.make_site(site, bundle)
        (site / _TALK).write_bytes(talk.tobytes())
        soundfile.write(sound, talk, DEVICE_RATE)
        arguments = programs.fake_microphone(sound, again=True)
        with programs.host(site) as url, programs.chromium(*arguments) as browser:
            page = browser.new_page()
            if not real_time:
                page.add_init_script(_FAST_MICROPHONE)
            page.goto(url)
            page.wait_for_selector("body.ready", timeout=0)
            page.click("#microphone")
            page.wait_for_selector('[data-state="live"]', timeout=0)
            if not real_time:
                given = {"file": _TALK, "rate": DEVICE_RATE, "seconds": 60 * minutes}
                page.evaluate(f"void ({_SPEAK})({json.dumps(given)})")
            profiler, begin = page.context.new_cdp_session(page), time.monotonic()
            while (spoken := _minutes(page, begin, real_time=real_time)) < minutes:
                if spoken >= step * (len(samples) + 1):
                    if not real_time:
                        profiler.send("HeapProfiler.collectGarbage")
                    samples.append((round(spoken, 1), round(largest_renderer_mb(), 1)))
                    progress(f"{samples[-1][0]} minutes: {samples[-1][1]} MB")
                page.wait_for_timeout(1000)
            num_segments = page.locator("#segments li").count()
            if problem := page.locator("#problem").text_content():
                raise RuntimeError(f"the page failed: {problem}")
    return {"minutes": minutes, "real_time": real_time, "num_segments": num_segments, "samples": samples}


def _minutes(page: Any, begin: float, *, real_time: bool) -> float:
    seconds = time.monotonic() - begin if real_time else page.evaluate("window.fed ?? 0")
    return float(seconds) / 60


def largest_renderer_mb() -> float:
    """Memory of the largest page process of our browser: its private and its share of shared pages."""
    largest = 0.0
    for process in renderers():
        with contextlib.suppress(OSError, StopIteration):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
            sizes = (int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            largest = max(largest, next(sizes))
    return largest / 1000


def renderers() -> list[int]:
    """The page processes of our browser."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if b"--type=renderer" in (process / "cmdline").read_bytes() and _is_descendant(int(process.name)):
                found.append(int(process.name))
        except (OSError, ValueError):
            continue
    return found


def _is_descendant(pid: int) -> bool:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        if pid == os.getpid():
            return True
    return False
