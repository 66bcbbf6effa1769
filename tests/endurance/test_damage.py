"""Damaged files and odd options: a documented error or a result, no crash, hang or output. And killed processes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile
from damage import NUM_INPUTS, ODD_VALUES, one_of, tried
from damaged_audio import use_damaged_audio, use_damaged_uploads
from damaged_files import use_damaged_bundles, use_damaged_configs, use_damaged_models

import u2moe
from u2moe.runtime.audio.decoder import FileDecoder
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.results import read_outcomes
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.options import SEARCHES
from u2moe.runtime.text.formats import FORMATS, format_transcript

FEW = {"audio": 24, "media": 24, "uploads": 60, "bundles": 12, "options": 12, "models": 40, "configs": 40}
MANY = {"uploads": 50_000 * NUM_INPUTS // 3000}
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.endurance)]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", FEW)
def test_an_input_is_refused_or_used(kind, counts, recognizer, sound, tmp_path, capfd):
    clip, decoder = sound[:8000], FileDecoder()
    if kind in ("media", "uploads"):
        pytest.importorskip("av")
    match kind:
        case "audio" | "media":
            use = use_damaged_audio(recognizer, clip, tmp_path / kind, media=kind == "media")
        case "uploads":
            use = use_damaged_uploads(clip, recognizer.bundle.manifest.features.sample_rate, decoder)
        case "bundles":
            use = use_damaged_bundles(recognizer.bundle.path, clip, tmp_path)
        case "options":
            use = use_odd_options(recognizer, clip)
        case "models":
            use = use_damaged_models(recognizer.vocabulary, tmp_path)
        case "configs":
            use = use_damaged_configs(sorted(Path(__file__).parents[1].glob("golden/*/train.yaml")), tmp_path)
    documented = (u2moe.U2moeError, ValueError) if kind == "options" else (u2moe.U2moeError,)
    outcomes = tried(use, documented, counts.get(kind, NUM_INPUTS), tmp_path)
    decoder.stop()
    assert outcomes["refused"] > 0
    assert outcomes.total() > outcomes["refused"] or kind in ("bundles", "options", "models")
    assert capfd.readouterr().out == ""


def test_an_undocumented_error_fails_with_its_seed(tmp_path):
    def use(random):
        raise KeyError

    with pytest.raises(AssertionError, match="seed 0: not a documented error"):
        tried(use, (ValueError,), 1, tmp_path)


# -------------------- options, hotwords, sample rates and samples, odd or not: used if they are accepted

_DTYPES = ("float32", "float64", "int16", "int32", "uint8", "bool", "complex64", "O", "U4", "float16")


def use_odd_options(recognizer, clip):
    """Return a function that draws options, and recognises a clip with them, as a whole or as a stream."""
    transcript = recognizer.transcribe(clip)

    def transcribe(random):
        recognizer.transcribe(clip, options=_decoding_options(random), hotwords=_hotwords(random))

    def stream(random):
        own = u2moe.Recognizer(recognizer.bundle, recognizer.model, _decoding_options(random))
        source = own.create_stream(hotwords=_hotwords(random))
        for portion in np.array_split(clip, random.integers(1, 9)):
            source.accept_waveform(own.bundle.manifest.features.sample_rate, portion)
            own.decode_streams([source])
        source.input_finished()
        own.decode_streams([source])
        source.get_result()

    def samples(random):
        rate = one_of(_or_odd((8000, 16_000, 44_100, 11_025.5, 1, 1e9), random), random)
        recognizer.transcribe(_samples(clip, random), rate)

    def subtitles(random):
        names = (*FORMATS, *(value for value in ODD_VALUES if isinstance(value, str)))
        format_transcript(transcript, one_of(names, random), options=_drawn(u2moe.SubtitleOptions, random))

    def speech(random):
        _drawn(u2moe.VadOptions, random)

    def load(random):  # takes a fifth of a second
        names = ("num_threads", "providers", "provider_options", "sess_options")
        settings = {name: one_of(ODD_VALUES, random) for name in names if random.random() < 0.5}
        u2moe.Bundle.open(recognizer.bundle.path).load(u2moe.SessionSettings(**settings))

    def use(random):
        uses = (transcribe, transcribe, stream, stream, samples, subtitles, speech)
        (load if random.random() < 0.02 else one_of(uses, random))(random)
        return "accepted"

    return use


def _or_odd(values, random, odd=ODD_VALUES):
    return values if random.random() > 0.15 else odd


def _drawn(options, random, **fields):
    """Return options with some fields odd or near their defaults, and some given."""
    for field in dataclasses.fields(options):
        if field.name not in fields and random.random() < 0.3:
            fields[field.name] = one_of(_or_odd((_near(field.default, random),), random), random)
    return options(**fields)


def _near(default, random):
    if isinstance(default, bool):
        return bool(random.random() < 0.5)
    if isinstance(default, int):
        return one_of((int, np.int32), random)(round(default * random.uniform(0.1, 3)))
    number = random.uniform(0, 3) * (default if isinstance(default, float) and default else 0.5)
    return one_of((float, np.float32), random)(number)


def _decoding_options(random):
    fields = {"search": one_of(_or_odd((None, *SEARCHES), random), random)}
    if random.random() < 0.5:
        fields["chunk_size"] = one_of((None, 1, 3, 4, 16, 16, 100, 1000, 10**6, -1), random)
        fields["num_left_chunks"] = one_of((-1, 0, 1, 4, 4, 100, 10**6, 10**9), random)
    if random.random() < 0.3:
        rules = {f"rule{number}": _drawn(u2moe.EndpointRule, random) for number in (1, 2, 3) if random.random() < 0.5}
        fields["endpoint"] = _drawn(u2moe.EndpointConfig, random, **rules)
    return _drawn(u2moe.DecodingOptions, random, **fields)


def _hotwords(random):
    if random.random() < 0.5:
        return None
    words, odd = ("SEVEN", "the old harbour", "SEVEN FIFTEEN", "x" * 1000), ("", " ", "ß", "a\0b", "\ud800", 3, None)
    phrases = [one_of(_or_odd(words, random, odd), random) for _ in range(random.integers(0, 4))]
    pairs = [(phrase, one_of(_or_odd((1.5, 0.1, 100), random), random)) for phrase in phrases]
    return one_of(_or_odd((phrases, pairs, dict(pairs)), random), random)


def _samples(clip, random):
    if random.random() < 0.2:
        return one_of(ODD_VALUES, random)
    values = clip.copy()
    for _ in range(random.integers(0, 3)):
        values[random.integers(len(values))] = one_of((np.nan, np.inf, -np.inf, 1e38, 0.0), random)
    shape = one_of(((-1,), (1, -1), (-1, 1), (2, -1), (-1, 2), (1, 1, -1)), random)
    some = one_of((values[: len(values) // 2 * 2], values[:2], values[:0]), random)
    with np.errstate(all="ignore"):
        return some.reshape(shape if some.size else (0,)).astype(one_of(_DTYPES, random))


# -------------------- killed processes and machines of a corpus run: every utterance is written exactly once

RATE = 16_000
MOST_BLOCKS = 2
"""Maximum number of blocks finished between two kills."""


def make_corpus(folder, count):
    rng = np.random.default_rng(0)
    clips = [read_audio(clip, RATE) for clip in find_audio([DEMO_FOLDER / "clips"])]
    folder.mkdir()
    names = [f"{number:06}.wav" for number in range(count)]
    for name in names:
        clip, length = clips[rng.integers(len(clips))], int(rng.uniform(0.3, 0.6) * RATE)
        start = int(rng.integers(max(len(clip) - length, 1)))
        soundfile.write(folder / name, clip[start : start + length] * rng.uniform(0.3, 1), RATE)
    (folder / "list").write_text("\n".join(names), encoding="utf-8")
    return folder / "list"


def start(listed, output):
    command = [sys.executable, "-m", "u2moe", "corpus", listed, output, "--workers", "1", "--block-size", "50"]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def kill(process, victim, rng):
    """Kill a recognising process, the process that directs them, or all processes of a machine; return whether it
    existed."""
    with suppress(OSError, IndexError):  # no workers
        if victim == "machine":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "driver":
            process.kill()
        else:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
            os.kill(int(rng.choice(workers)), signal.SIGKILL)
        return True
    return False


def disturbed(listed, output, num_kills):
    rng, kills, wanted, folder = Random(0), 0, 1, OutputFolder(str(output))
    machines = [start(listed, output) for _ in range(2)]
    try:
        while any(machine.poll() is None for machine in machines):
            time.sleep(rng.uniform(0.02, 0.3))
            is_time = kills < num_kills and len(folder.finished_blocks()) >= wanted
            if is_time and kill(rng.choice(machines), rng.choice(("worker", "driver", "machine")), rng):
                kills, wanted = kills + 1, len(folder.finished_blocks()) + rng.randint(0, MOST_BLOCKS)
            machines = [start(listed, output) if machine.poll() not in (None, 0) else machine for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    return kills


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.timeout(7200)
def test_every_utterance_is_there_once(tmp_path):
    num_files, num_kills = 6000, 60
    listed = make_corpus(tmp_path / "corpus", num_files)
    assert start(listed, tmp_path / "undisturbed").wait() == 0
    assert 0 < disturbed(listed, tmp_path / "disturbed", num_kills) <= num_kills
    folder, undisturbed = (OutputFolder(str(tmp_path / name)) for name in ("disturbed", "undisturbed"))
    outcomes = list(read_outcomes(folder))
    assert len({outcome.key for outcome in outcomes}) == len(outcomes) == num_files
    assert not any(outcome.error for outcome in outcomes)
    assert [found[::2] for found in folder.contents()] == [found[::2] for found in undisturbed.contents()]
