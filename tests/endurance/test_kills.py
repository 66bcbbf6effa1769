"""Processes and whole machines of a corpus run are killed: every utterance is written exactly once."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.results import read_outcomes
from u2moe.runtime.corpus.run_folder import OutputFolder

pytestmark = [pytest.mark.slow, pytest.mark.endurance, pytest.mark.skipif(os.name != "posix", reason="signals")]

RATE = 16_000
MOST_BLOCKS = 2
"""Maximum number of blocks finished between two kills."""


def make_corpus(folder, count):
    """Write short files cut from the bundled clips, and a list of them."""
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
    """Start a session of processes, as on a separate machine."""
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
    """Run on two machines to the end, killing and restarting processes; return the number of kills."""
    rng, kills, wanted, folder = random.Random(0), 0, 1, OutputFolder(str(output))
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
