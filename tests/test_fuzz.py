import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.endurance import damaged_configs, fuzz
from u2moe.runtime import AudioError


@pytest.fixture
def clips(tmp_path, sound):
    soundfile.write(tmp_path / "clip.wav", sound, 16_000)
    return tmp_path / "clip.wav"


def test_damaged_inputs_are_refused_or_read(bundle, clips, tmp_path, capsys):
    file = tmp_path / "fuzz.json"
    assert fuzz.main([str(bundle.path), str(clips), "--inputs", "36", "--output", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["num_inputs"] == {"audio": 24, "bundle": 12}
    assert results["num_refused"] + results["num_accepted"] == 36
    assert results["num_refused"] > 0 < results["num_accepted"]
    assert results["start_mb"] > 0 < results["end_mb"]
    assert fuzz.values(results)["table"] in capsys.readouterr().out


def test_an_input_is_made_from_its_seed(sound):
    made = [fuzz.damaged_audio(sound[:8000], 16_000, np.random.default_rng(seed)) for seed in (1, 2, 1)]
    assert made[0] == made[2] != made[1]


def test_errors_that_are_not_ours_are_failures():
    def fail(error):
        raise error

    assert fuzz.outcome_of(lambda: None) == "accepted"
    assert fuzz.outcome_of(lambda: fail(AudioError("bad"))) == "refused"
    assert fuzz.outcome_of(lambda: fail(KeyError("a\n b"))) == "KeyError: 'a\\n b'"


def test_an_input_that_ends_the_process_is_counted_and_the_rest_done(bundle, clips, monkeypatch):
    """Input 3 ends the child, as a fault in a decoder would; 5 raises an error of Python's; 6 and 7 make code print."""
    real_popen = fuzz.subprocess.Popen
    program = r"""
import os, sys
from u2moe.benchmarks.endurance import damaged_configs, fuzz

def read_inputs(bundle, audio, seeds):
    for seed in seeds:
        if seed == 3:
            os._exit(9)
        if seed == 6:
            print("Falling back")
        if seed == 7:
            os.write(1, b"\xff\n")
        yield fuzz.kind_of(seed), "KeyError: 'x'" if seed == 5 else "refused"

fuzz.read_inputs = read_inputs
sys.exit(fuzz.main(sys.argv[1:]))
"""

    def popen(command, **settings):
        assert command[1:3] == ["-m", "u2moe.benchmarks.endurance.fuzz"]
        return real_popen([command[0], "-c", program, *command[3:]], **settings)

    monkeypatch.setattr(fuzz.subprocess, "Popen", popen)
    report = fuzz.fuzz(bundle.path, [clips], 9)
    assert report.num_inputs == {"audio": 6, "bundle": 3}
    assert (report.num_refused, report.num_accepted, report.num_failed) == (5, 0, 4)
    assert report.failures == [
        "audio 3: the process ended with 9", "bundle 5: KeyError: 'x'", "audio 6: printed Falling back",
        "audio 7: printed \ufffd",
    ]  # fmt: skip


def test_bundles_are_damaged_in_a_copy(bundle, tmp_path):
    before = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    changed = 0
    for seed in range(20):
        target = tmp_path / str(seed)
        fuzz.damage_bundle(bundle.path, target, np.random.default_rng(seed))
        after = {file.name: file.read_bytes() for file in target.iterdir()}
        changed += after != before
    assert changed >= 18  # a file may be exchanged for itself
    assert {file.name: file.read_bytes() for file in bundle.path.iterdir()} == before


def test_memory_of_children_is_limited():
    if os.name != "posix":
        pytest.skip("of Unix only")
    program = "from u2moe.benchmarks.endurance import fuzz; fuzz.limit_memory(); bytearray((fuzz.MEMORY_GB + 1) << 30)"
    done = fuzz.subprocess.run([fuzz.sys.executable, "-c", program], capture_output=True, check=False)
    assert b"MemoryError" in done.stderr


TRAIN_YAMLS = sorted(Path(__file__).parent.glob("golden/*/train.yaml"))


def test_damaged_training_configs_are_refused_or_read():
    """In a process of its own, whose memory is limited."""
    command = [sys.executable, "-m", "u2moe.benchmarks.endurance.damaged_configs", *map(str, TRAIN_YAMLS)]
    done = subprocess.run([*command, "--inputs", "120"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(reversed(part.split()) for part in done.stdout.strip().split(", "))
    assert sorted(counts) == ["accepted", "refused"]
    assert int(counts["accepted"]) + int(counts["refused"]) == 120


def test_a_training_config_is_damaged_by_its_seed():
    texts = [file.read_text(encoding="utf-8") for file in TRAIN_YAMLS]
    made = [damaged_configs.damaged_config(texts, np.random.default_rng(seed)) for seed in (1, 2, 1)]
    assert made[0] == made[2] != made[1]


def test_errors_in_training_configs_that_are_not_ours_are_failures(monkeypatch, capsys):
    def read(file):
        raise KeyError(file.name)

    monkeypatch.setattr(damaged_configs, "limit_memory", lambda: None)
    monkeypatch.setattr(damaged_configs, "read_training_config", read)
    assert damaged_configs.main([*map(str, TRAIN_YAMLS), "--inputs", "1"]) == 1
    assert capsys.readouterr().out.splitlines() == ["0: KeyError: 'train.yaml'", "1 KeyError: 'train.yaml'"]


def test_what_takes_too_long_is_ended():
    if os.name != "posix":
        pytest.skip("of Unix only")
    with pytest.raises(TimeoutError, match=r"took more than 0\.01 s"), damaged_configs.time_limit(0.01):
        time.sleep(60)
    with damaged_configs.time_limit(60):
        pass
    assert damaged_configs.signal.getitimer(damaged_configs.signal.ITIMER_REAL) == (0, 0)
