"""Small corpora of tones or noise, and the toy model as loaded by the workers of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import soundfile
from tones import RATE, TONES, ToyBundle, ToyModel, say

from u2moe.runtime import DecodingOptions, Recognizer, SessionSettings
from u2moe.runtime.model.native import Kernels


@dataclass(frozen=True, kw_only=True)
class ToyChoice:
    """A substitute for `ModelChoice`."""

    threshold: float = 19.0
    options: DecodingOptions = field(default_factory=DecodingOptions)
    settings: SessionSettings = field(default_factory=SessionSettings)
    num_threads: int = 1
    hotwords_digest: str | None = None
    can_be_forked: bool = True

    def load(self):
        model = ToyModel(self.threshold)
        model.providers = ("CPUExecutionProvider",)
        model.kernels = Kernels(native=False)
        bundle = ToyBundle()
        bundle.fingerprint = f"{self.threshold:064}"
        return Recognizer(bundle, model, self.options)


def write_corpus(folder, num=10, seed=0):
    """Write a data.list of `num` utterances of tones with transcripts, of different lengths and speakers."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num):
        words = rng.choice(list(TONES), rng.integers(1, 4))
        samples, _ = say(words, [0.15] * len(words))
        soundfile.write(folder / f"{number}.wav", samples, RATE)
        lines.append({"key": f"k{number}", "wav": f"{number}.wav", "txt": " ".join(words), "speaker": f"s{number % 3}"})
    return write_list(folder / "data.list", lines)


def write_list(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def rows_in(output):
    """Return the rows of a folder of results, in order."""
    files = sorted(output.glob("blocks/*/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def files_in(output):
    """Return names and contents of all results."""
    return {file.name: file.read_bytes() for file in output.glob("blocks/*/*")}


def listed(corpus):
    """Return the lines of a data.list."""
    return [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]


def crashing(corpus, folder, command):
    """Write a Kaldi folder of six utterances; the third is a command that affects the worker that runs it."""
    folder.mkdir()
    lines = [f"{line['key']} {corpus.with_name(line['wav'])}\n" for line in listed(corpus)[:6]]
    lines[2] = f"k2 {command} |\n"
    (folder / "wav.scp").write_text("".join(lines), encoding="utf-8")
    return folder


def assert_survives_kill(script, corpus, folder):
    """Kill a run with all its processes while it waits at the third utterance; a second run completes it. The script
    receives a list, whose commands it must allow, and the folder of the results."""
    marker, out = folder / "once", folder / "out"
    command = f"test -e {marker} || {{ touch {marker}; sleep 60; }}; cat {corpus.with_name('2.wav')}"
    arguments = [sys.executable, "-c", script, str(crashing(corpus, folder / "kaldi", command)), str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("RAY_ADDRESS", None)
    run = subprocess.Popen(arguments, env=environment, start_new_session=True)
    while not (marker.exists() and len(files_in(out)) == 2):
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert len(files_in(out)) == 2
    subprocess.run(arguments, env=environment, check=True)
    assert [row["text"] for row in rows_in(out)] == [line["txt"] for line in listed(corpus)[:6]]


def write_noise(folder, number, length):
    """Write recordings of noise that rises and falls at another rate in each, and return the folder."""
    folder.mkdir(exist_ok=True)
    for index in range(number):
        noise = np.random.default_rng(index).standard_normal(length)
        samples = noise * np.abs(np.sin(np.arange(length) / (1000 + 900 * index))) * 0.2
        soundfile.write(folder / f"{index}.wav", samples.astype(np.float32), 16_000)
    return folder
