import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.endurance import fuzz, worker
from u2moe.benchmarks.endurance.damaged_audio import FORMATS, damaged_audio, encoded
from u2moe.benchmarks.endurance.damaged_bundles import damage_bundle
from u2moe.benchmarks.endurance.damaged_configs import damaged_config, use_damaged_configs
from u2moe.benchmarks.endurance.odd_options import decoding_options, drawn
from u2moe.benchmarks.endurance.worker import Worker, outcome_of
from u2moe.runtime import AudioError, SubtitleOptions

pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers are of Unix alone")
TRAIN_YAMLS = sorted(Path(__file__).parent.glob("golden/*/train.yaml"))


@pytest.fixture
def clip(tmp_path, sound):
    soundfile.write(tmp_path / "clip.wav", sound, 16_000)
    return tmp_path / "clip.wav"


def test_inputs_of_all_kinds_are_refused_or_used(bundle, clip, tmp_path, capsys):
    pytest.importorskip("av")
    file = tmp_path / "fuzz.json"
    configs = ["--configs", *map(str, TRAIN_YAMLS)]
    inputs = ["--inputs", "audio=24", "media=24", "bundles=12", "options=12", "models=40", "configs=40"]
    code = fuzz.main([str(bundle.path), str(clip), *configs, *inputs, "--results", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    kinds = results["kinds"]
    assert {kind: found["failures"] for kind, found in kinds.items()} == {kind: [] for kind in kinds}
    assert code == 0
    assert {kind: found["num_inputs"] for kind, found in kinds.items()} == {
        "audio": 24, "media": 24, "bundles": 12, "options": 12, "models": 40, "configs": 40,
    }  # fmt: skip
    for found in kinds.values():
        assert sum(found["outcomes"].values()) == found["num_inputs"]
        assert found["outcomes"]["refused"] > 0
        assert found["memory_mb"][-1][1] > 10
    assert kinds["configs"]["outcomes"]["accepted"] > 0
    assert fuzz.values(results)["table"] in capsys.readouterr().out
    assert (fuzz.values(results)["tried"], fuzz.values(results)["failed"]) == ("152", "0")


def test_numbers_of_inputs_are_checked():
    assert fuzz._counts(["audio=7"], {"audio": 1, "options": 2}) == {"audio": 7, "options": 2}
    for pair in ("audio", "audio=-1", "video=1"):
        with pytest.raises(ValueError, match="expected KIND=NUMBER with a kind of audio, got"):
            fuzz._counts([pair], {"audio": 1})


def test_inputs_are_made_from_their_seeds(sound):
    texts = [file.read_text(encoding="utf-8") for file in TRAIN_YAMLS]
    files = [encoded(sound[:8000], 16_000, *file_format) for file_format in FORMATS]

    def made(seed):
        random = np.random.default_rng(seed)
        return damaged_audio(files, random), damaged_config(texts, random)

    assert made(1) == made(1) != made(2)


def test_errors_that_are_not_documented_are_failures():
    def fail(error):
        raise error

    assert outcome_of(lambda: "accepted", (AudioError,)) == "accepted"
    assert outcome_of(lambda: fail(AudioError("bad")), (AudioError,)) == "refused"
    assert outcome_of(lambda: fail(KeyError("a\n b")), (AudioError,)) == "KeyError: 'a\\n b'"


FAULTY = r"""
import os, sys, time
from u2moe.benchmarks.endurance.worker import answer

def use(random):
    seed = int(random.bit_generator.seed_seq.entropy)
    if seed == 3:
        os._exit(9)
    if seed == 4:
        while True:
            pass
    if seed == 5:
        raise KeyError("x")
    if seed == 8:
        time.sleep(600)
    if seed == 6:
        print("Falling back")
    if seed == 7:
        os.write(1, b"\xff\n")
    return "accepted"

answer(sys.stdin, use, (ValueError,))
"""


def start(kind):
    return Worker(["-c", FAULTY], limit_s=0.5)


def test_what_ends_or_stops_a_worker_is_counted_and_the_rest_done(tmp_path):
    found = fuzz.fuzz(start, tmp_path / "fuzz.json", {"audio": 10})["kinds"]["audio"]
    assert found["num_inputs"] == 10
    assert found["outcomes"] == {"accepted": 4}
    assert found["failures"] == [
        "3: the process ended with 9", "4: hangs: took more than 0.5 s", "5: KeyError: 'x'", "6: printed Falling back",
        "7: printed \ufffd", "8: hangs: took more than 0.5 s",
    ]  # fmt: skip
    assert found["num_failed"] == 6
    shown = fuzz.values({"kinds": {"audio": found}})
    assert "- damaged audio files, `5: KeyError: 'x'`" in shown["table"]


def test_a_run_that_is_stopped_goes_on(tmp_path):
    asked = []

    class Counting(Worker):
        def ask(self, seed):
            asked.append(seed)
            return super().ask(seed)

    def starts(kind):
        return Counting(["-c", FAULTY], limit_s=0.5)

    results = tmp_path / "fuzz.json"
    fuzz.fuzz(starts, results, {"audio": 2, "options": 2})
    assert fuzz.fuzz(starts, results, {"audio": 3, "options": 2}, until=time.monotonic())["kinds"]["audio"][
        "num_inputs"] == 2  # fmt: skip
    found = fuzz.fuzz(starts, results, {"audio": 3, "options": 2})["kinds"]
    assert (found["audio"]["num_inputs"], found["options"]["num_inputs"]) == (3, 2)
    assert sorted(asked) == [0, 0, 1, 1, 2]


def test_bundles_are_damaged_in_a_copy(bundle, tmp_path):
    before = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    changed = 0
    for seed in range(30):
        target = tmp_path / str(seed)
        damage_bundle(bundle.path, target, np.random.default_rng(seed))
        after = {file.name: file.read_bytes() for file in target.iterdir() if file.is_file()}
        changed += after != before
    assert changed >= 27  # a file may be exchanged for itself
    assert {file.name: file.read_bytes() for file in bundle.path.iterdir()} == before


def test_some_options_are_good_and_some_are_not():
    counts = {"good": 0, "odd": 0}
    for seed in range(100):
        random = np.random.default_rng(seed)
        try:
            decoding_options(random)
            drawn(SubtitleOptions, random)
            counts["good"] += 1
        except ValueError:
            counts["odd"] += 1
    assert min(counts.values()) > 5


def test_configs_that_cannot_be_read_raise(tmp_path, monkeypatch):
    def read(file):
        raise KeyError(file.name)

    monkeypatch.setattr("u2moe.benchmarks.endurance.damaged_configs.read_training_config", read)
    with pytest.raises(KeyError, match=r"train\.yaml"):
        use_damaged_configs(TRAIN_YAMLS, tmp_path)(np.random.default_rng(0))


def test_memory_of_workers_is_limited():
    program = (
        "from u2moe.benchmarks.endurance import worker; worker.limit_memory(); bytearray((worker.MEMORY_GB+1)<<30)"
    )
    done = worker.subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert b"MemoryError" in done.stderr
