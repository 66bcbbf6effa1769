"""Does the page of examples/browser take the same memory however long somebody speaks? Called by `runtimes.speed`.

The page is that which people use: its microphone, transcript and sound. In real time the browser's microphone plays a
file again and again. Else the blocks that a microphone would give come as fast as they are recognised, and garbage is
collected before each measurement, since the browser has no idle time for it.

What is counted is private memory of the page's process, worker and WebAssembly included. The code of the browser, which
its processes share, would count for less whenever another browser runs beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from u2moe.benchmarks.runtimes import programs
from u2moe.benchmarks.runtimes.equality import recordings_of

DEVICE_RATE = 48_000
_SAMPLE_MINUTES = 0.5
_REPEATS = 3
_SOUND_MINUTES = 10.5
"""When the page has all the sound that it keeps (KEPT_S in sound.js), so that each new block replaces an old one."""
_HIGHER = 1.05
SHORTEST_MINUTES = 15
"""A shorter measurement has too few samples with all that sound."""
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
        `minutes`, `real_time`, `num_segments`, and `samples`: pairs of minutes and MB.
    """
    recordings = recordings_of([], None, DEVICE_RATE)
    pause = np.zeros(DEVICE_RATE * 3 // 2, np.int16)
    talk = np.tile(np.concatenate([part for each in recordings for part in (each, pause)]), _REPEATS)
    samples: list[tuple[float, float]] = []
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
                if spoken >= _SAMPLE_MINUTES * (len(samples) + 1):
                    if not real_time:
                        profiler.send("HeapProfiler.collectGarbage")
                    samples.append((round(spoken, 1), round(max(map(private_mb, renderers())), 1)))
                    progress(f"{samples[-1][0]} minutes: {samples[-1][1]} MB")
                page.wait_for_timeout(1000)
            num_segments = page.locator("#segments li").count()
            if problem := page.locator("#problem").text_content():
                raise RuntimeError(f"the page failed: {problem}")
    return {"minutes": minutes, "real_time": real_time, "num_segments": num_segments, "samples": samples}


def _minutes(page: Any, begin: float, *, real_time: bool) -> float:
    seconds = time.monotonic() - begin if real_time else page.evaluate("window.fed ?? 0")
    return float(seconds) / 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trend:
    """Memory once the page has all the sound that it keeps, in two halves of equal length; MB."""

    first_peak: float
    second_peak: float
    slope: float
    """Of a line through the second half, in MB an hour."""
    scatter: float
    """Standard deviation of the second half about that line: garbage comes and is collected."""
    rise: float
    """Of that line from the first to the last sample of the second half."""

    @property
    def is_flat(self) -> bool:
        """The line rises by less than the samples scatter, and the second peak is at most 5 % higher than the first."""
        return self.rise <= self.scatter and self.second_peak <= _HIGHER * self.first_peak


def trend_of(samples: Sequence[tuple[float, float]]) -> Trend:
    """What pairs of minutes and MB say.

    Raises:
        ValueError: the measurement ended before there were enough samples.
    """
    steady = np.array([sample for sample in samples if sample[0] >= _SOUND_MINUTES])
    half = len(steady) // 2
    if half < 3:  # fewer say nothing about scatter
        raise ValueError(f"found {len(steady)} samples after minute {_SOUND_MINUTES}, expected at least 6")
    first, second = steady[:half], steady[half:]
    minutes, sizes = second.T
    slope, begin = np.polyfit(minutes, sizes, 1)
    return Trend(
        first_peak=float(first[:, 1].max()),
        second_peak=float(sizes.max()),
        slope=float(60 * slope),
        scatter=float(np.std(sizes - (slope * minutes + begin), ddof=2)),
        rise=float(slope * (minutes[-1] - minutes[0])),
    )


def private_mb(process: int) -> float:
    """Memory that a process has for itself, in RAM or swapped out; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))) / 1000
    return 0.0


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
