"""The commands of the recipe's README, run in order on seconds of noise with texts."""

import gzip
import importlib.util
import io
import lzma
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from wordnet import write_wordnet

from u2moe.export.checkpoint import Checkpoint

pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
soundfile = pytest.importorskip("soundfile")
torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.endurance,
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes share weights by fork"),
]

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
COLUMNS = "clip\toffset\tsize\tseconds\tspeaker_group\tsplit\tcer\ttext\n"
SMALL = '''"""Runs scripts of the recipe with less of everything, and with noise for voices and foreign formats.

Each line of standard input is a script with its arguments, run in a process with all imports. Its output
goes to the file `printed`, and its exit code to standard output.
"""
import importlib, multiprocessing, os, sys
import numpy as np

multiprocessing.set_start_method("fork")
noise = lambda seconds: (0.1 * np.random.default_rng(1).standard_normal(int(seconds * 16000))).astype(np.float32)

import corpus, fragments, phones, prepare, synthesize, teacher, testsets, voices

synthesize.HOURS = {"hibari": 0.01, "espeak": 0.005, "hibari-words": 0.003, "pico-us-dictionaries": 0.003}
synthesize.HELD_OUT_SENTENCES = 2
synthesize.speaker = lambda voice: lambda text, rng: voices.Speech(noise(0.5 + len(text) / 14), 16000)
prepare.NUM_SENTENCES, prepare.NUM_SILENCES = 4000, 3
testsets.decoded = lambda path, *options: noise(2)

def read_noises(blanket, music, folder):
    with corpus.Pack(folder / "noise", corpus.SPEECH) as pack:
        pack.append(corpus.to_pcm(noise(30)), "noise", "-")

class Teacher:
    def __init__(self, folder):
        self.matrix = np.random.default_rng(1).standard_normal((corpus.TARGET_ROW, corpus.TARGETS.width + 8))

    def rows(self, window):
        return window.reshape(-1, corpus.TARGET_ROW) @ self.matrix

class Aligner:
    def words(self, samples, transcript):
        words = transcript.split()
        return [phones.Stretch(word, 30 * place, 30 * place + 20) for place, word in enumerate(words)]

fragments.Aligner, prepare.read_noises = Aligner, read_noises
teacher.unpack_model, teacher.Teacher = lambda folder: folder, Teacher

def call(script, *arguments):
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.argv = [script, *arguments]
    importlib.import_module(script.removesuffix(".py")).main()

for line in sys.stdin:
    process = multiprocessing.Process(target=call, args=line.split())
    process.start()
    process.join()
    print(process.exitcode, flush=True)
'''


def commands(heading):
    """Return the command lines below a heading of the README, without comments."""
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    return [line.partition("#")[0].strip() for line in blocks.splitlines() if re.match(r"python|cp", line)]


def game(folder, table, archive):
    """Write a game of six clips of noise, as FLAC files in one archive, and its table."""
    rng = np.random.default_rng(1)
    archive.parent.mkdir(parents=True)
    rows, offset = [], 0
    with archive.open("wb") as file:
        for number, split in enumerate(("train", "train", "dev", "dev", "test", "test")):
            clip = archive.with_suffix(".flac")
            soundfile.write(clip, 0.1 * rng.standard_normal(11025), 11025)
            size = file.write(clip.read_bytes())
            rows.append(f"{number}\t{offset}\t{size}\t1.0\t{split}\t{split}\t0.1\tThis is line {number}.\n")
            offset += size
    (folder / table).write_bytes(lzma.compress((COLUMNS + "".join(rows)).encode()))


def write_monologues(content, table):
    """Write The Ur-Quan Masters with one clip of one line of noise."""
    for name in ("packages", "addons"):
        (content / name).mkdir(parents=True)
    noise = io.BytesIO()
    soundfile.write(noise, 0.1 * np.random.default_rng(1).standard_normal(11025), 11025, format="OGG")
    with ZipFile(content / "packages/uqm-0.8.0-content.uqm", "w") as file:
        file.writestr("base/comm/vux/vux.txt", "#(HI) vux-000.ogg\nLine of a stranger.\n")
    with ZipFile(content / "addons/uqm-0.8.0-voice.uqm", "w") as file:
        file.writestr("3dovoice/vux/vux.ts", "#(HI)\n")
        file.writestr("3dovoice/vux/vux-000.ogg", noise.getvalue())
    table.write_bytes(lzma.compress(b"clip\tline\tcer\nvux-000.ogg\t0\t0.1\n"))


def write_packages(folder):
    """Write the files that the recipe reads from the Debian packages, with a few lines each."""
    share = folder / "usr/share"
    write_wordnet(share)
    (share / "dictd").mkdir()
    for name in ("gcide", "foldoc", "jargon", "devil"):
        (share / f"dictd/{name}.dict.dz").write_bytes(gzip.compress(f"{name}\n\n   What one finds in it.\n".encode()))
    (share / "games/fortunes").mkdir(parents=True)
    (share / "games/fortunes/wisdom").write_text("Never feed a sleeping dragon.\n")
    (share / "doc/anarchism").mkdir(parents=True)
    (share / "doc/asterisk-core-sounds-en").mkdir(parents=True)
    listing = gzip.compress(b"digits/1: one\ngoodbye: Thank you and goodbye.\n")
    (share / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").write_bytes(listing)
    for name in ("digits/1", "goodbye"):
        path = share / f"asterisk/sounds/en_US_f_Allison/{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (share / "saytime").mkdir()
    (share / "saytime/seven.au").write_bytes(b".snd")
    for name in ("librivox/transcription", "cards/cards.transcription"):
        path = share / "pocketsphinx/test/data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("<s> queen of hearts </s> (001)\n")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A copy of the recipe beside small packages."""
    folder = tmp_path_factory.mktemp("recipe") / "train_demo"
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("final.pt.xz", "exp", "__pycache__"))
    write_packages(folder / "debian")
    game(folder, "queen.tsv.xz", folder / "debian/usr/share/scummvm/flight-of-the-amazon-queen/queen.1c")
    for name in ("sky", "drascula"):
        (folder / f"{name}.tsv.xz").write_bytes(lzma.compress(COLUMNS.encode()))
    write_monologues(folder / "debian/usr/share/games/uqm/content", folder / "urquan.tsv.xz")
    (folder / "small.py").write_text(SMALL)
    return folder


@pytest.fixture(scope="module")
def run(recipe):
    """A function that runs a line of the README, scripts through `small.py`, and returns their output."""
    command = [sys.executable, "-W", "ignore", "small.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=recipe, env=environment, stdin=pipe, stdout=pipe, text=True) as scripts:

        def call(line):
            program, *words = line.split()
            if program != "python":
                return subprocess.run([program, *words], cwd=recipe, check=True)
            scripts.stdin.write(" ".join(words) + "\n")
            scripts.stdin.flush()
            code, printed = scripts.stdout.readline(), (recipe / "printed").read_text()
            assert code == "0\n", f"{line}\n{printed}"
            return printed

        yield call


def test_the_recipe_runs_from_its_readme(recipe, run):
    data = commands("The data")
    assert [line.split()[1] for line in data] == [
        "synthesize.py", "games.py", "urquan.py", "fragments.py", "revoice.py", "prepare.py", "teacher.py",
        "testsets.py", "withheld.py",
    ]  # fmt: skip
    for line in data:
        if "revoice" not in line or importlib.util.find_spec("pyworld"):
            run(line)
    assert (recipe / "exp/features/queen-fragments.tsv").stat().st_size
    assert "WHAT ONE FINDS IN IT" in (recipe / "exp/features/pico-us-dictionaries.tsv").read_text()
    resumed, compacted, copied, started, scored, *_ = commands("Resuming the run")
    run(copied)
    run("python train.py --name dense --until-step 1 --batch-frames 1200 --report-steps 1")
    run(compacted)  # a training state, which the repository does not contain
    shutil.rmtree(recipe / "exp/dense")
    begun = torch.load(recipe / "run/dense.pt", weights_only=True)["progress"]["step"]
    run(f"{started} --until-step {begun + 1} --batch-frames 1200 --report-steps 1")
    run(f"{resumed} --until-step {begun + 2} --report-steps 1")
    steps = re.findall(r" step (\d+) ", (recipe / "exp/dense/train.log").read_text())
    assert steps[-2:] == [str(begun + 1), str(begun + 2)]
    assert "dense.pt" in run(compacted)
    assert "queen-dev chunk 16" in run(scored)
    run("python wenet.py --name dense --output checkpoint-new")
    assert Checkpoint.open(recipe / "checkpoint-new").network() is not None
