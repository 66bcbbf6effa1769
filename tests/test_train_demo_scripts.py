"""Scripts of the demo model's recipe: data, language model, optimizer and evaluation, and the README's commands."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

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
import soundfile

pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
torch = pytest.importorskip("torch")

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
sys.path.insert(0, str(RECIPE))
import evaluate
import games
import language_model
import optimizers
import proof
import rnc
import withheld
from readings import num_errors, readings
from wordnet import write_wordnet

from u2moe.export.checkpoint import Checkpoint
from u2moe.runtime import LanguageModel
from u2moe.runtime.language.kneser_ney import TrainingOptions

COLUMNS = "clip\toffset\tsize\tseconds\tspeaker_group\tsplit\tcer\ttext\n"
PACKED = bytes.fromhex(
    "524e43010000000f0000002400000000000140011000000000000808200000000000000101400000000000200400361d616263646566"
)
"""`abcdef`, then 9 bytes that repeat those 3 before, in the format of RNC's method 1."""


def test_packed_clips_of_a_split_are_read_where_the_recording_says(tmp_path, monkeypatch):
    """Two games: one with an archive of clips, one of them compressed, and one with a file for each clip."""
    assert rnc.unpack(PACKED) == b"abcdefdefdefdef"
    with pytest.raises(ValueError, match="15 bytes instead of 16"):
        rnc.unpack(PACKED[:4] + (16).to_bytes(4, "big") + PACKED[8:])
    with pytest.raises(ValueError, match="must begin with"):
        rnc.unpack(b"ZIP" + PACKED[3:])
    monkeypatch.setattr(games, "TABLES", tmp_path)
    clips, folder = [bytes(22) + bytes(range(100)), bytes(22) + PACKED], tmp_path / "usr/share/scummvm"
    (folder / "beneath-a-steel-sky").mkdir(parents=True)
    (folder / "beneath-a-steel-sky/sky.dsk").write_bytes(b"head" + b"".join(clips))
    (folder / "drascula/en").mkdir(parents=True)
    (folder / "drascula/en/D1.ALS").write_bytes(bytes([128, 0, 255]))
    one, two = (f"{4 + number * len(clips[0])}\t{len(clip)}\t0.01" for number, clip in enumerate(clips))
    rows = [
        f"1\t{one}\tA\ttrain\t0.1\tHello, you!\n",
        f"2\t{two}\tB\ttrain\t0.2\tAnd 2 more.\n",
        f"3\t{two}\tB\ttrain\t0.7\tNot what is said.\n",
        f"4\t{two}\tC\tdev\t0\tFor another day.\n",
        f"5\t{two}\tA\ttrain\t0\t...\n",
    ]
    for name, text in {"sky": "".join(rows), "drascula": "D1\t0\t3\t0\tD\ttrain\t0\tBlood\n"}.items():
        (tmp_path / f"{name}.tsv.xz").write_bytes(lzma.compress((COLUMNS + text).encode()))
    first, second = games.read_lines("sky", "train", tmp_path)
    assert (first.text, first.voice, second.text, second.voice) == ("HELLO YOU", "sky-A", "AND TWO MORE", "sky-B")
    assert np.array_equal(first.samples, (np.arange(100) - 128) / 128)
    assert len(second.samples) == 15
    assert [line.clip for line in games.read_lines("sky", "train", tmp_path, start=1)] == ["2"]
    assert [line.clip for line in games.read_lines("sky", "dev", tmp_path)] == ["4"]
    (blood,) = games.read_lines("drascula", "train", tmp_path)
    assert blood.samples.tolist() == [0, -1, 127 / 128]


def write_debian(folder, files):
    write_wordnet(folder / "usr/share")
    for name, content in files.items():
        file = folder / "usr/share" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def test_language_models_are_made_without_the_sentences_of_the_tests(tmp_path, monkeypatch):
    files = {
        "games/fortunes/wisdom": b"Never feed a sleeping dragon.\n%\nThe secret sentence is here.\n",
        "doc/anarchism/a.html": b"<p>Some <b>articles</b> are long. Others are not.</p>",
        "dictd/gcide.dict.dz": gzip.compress(b"A dictionary explains many words. "),
    }
    write_debian(tmp_path / "debian", files)
    table = b"text\tsplit\nLook behind you\ttrain\nNobody knows this\ttest\n"
    (tmp_path / "queen.tsv.xz").write_bytes(lzma.compress(table))
    (tmp_path / "test").mkdir()
    for name in (*withheld.TESTS, *withheld.VALIDATION[1:]):
        (tmp_path / "test" / f"{name}.tsv").write_text("a.flac\tTHE SECRET SENTENCE IS\n")
    sizes = {name: (TrainingOptions(order=2), 8) for name in language_model.SIZES}
    monkeypatch.setattr(games, "TABLES", tmp_path)
    monkeypatch.setattr(language_model, "SIZES", sizes)
    monkeypatch.setattr(language_model, "NUM_SPOKEN", 20)
    places = ["--work-dir", tmp_path, "--debian", tmp_path / "debian", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["", *map(str, places)])
    language_model.main()
    found = set((tmp_path / "out/general.txt").read_text(encoding="utf-8").splitlines())
    assert found >= {"the dog barked loudly", "never feed a sleeping dragon", "some articles are long"}
    assert "a dictionary explains many words" in found
    assert not [line for line in found if "secret" in line]
    assert (tmp_path / "out/game.txt").read_text(encoding="utf-8") == "look behind you\n"
    assert {path.stem for path in (tmp_path / "out").glob("*.lm")} == set(sizes)
    assert "behind" in LanguageModel.open(tmp_path / "out/game.lm").ngrams.words


def test_muon_moves_all_weights_by_matrices_whose_singular_values_are_near_one():
    torch.manual_seed(1)
    shapes = [(8, 8)] * (optimizers.PIECE + 3) + [(6, 2, 5), (12, 4)]
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    muon = optimizers.Muon(weights, lr=1.0, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    muon.step()
    for weight in weights:
        sizes = torch.linalg.svdvals(weight.detach().flatten(1)) / max(weight.flatten(1).shape) ** 0.5
        assert sizes.max() < 1.3 * optimizers.UPDATE_RMS
        assert sizes.median() > 0.6 * optimizers.UPDATE_RMS
        assert float((weight.detach() * weight.grad).sum()) < 0


def heard(transcript, *texts):
    conditions = [{"condition": name, "text": text, "cpu_s": 0.1} for name, text in zip("xy", texts, strict=True)]
    return {"name": "a", "transcript": transcript, "heard": conditions}


def test_scores_count_words_and_differences_the_same_utterances():
    content = {"audio_s": 10.0, "recordings": [heard("ONE TWO", "ONE TWO", "ONE"), heard("TWO", "TOO", "TWO TWO")]}
    found = evaluate.scores(content)
    assert found["x"]["wer"] == pytest.approx(1 / 3, abs=1e-6)
    assert (found["x"]["num_exact"], found["y"]["num_exact"], found["y"]["num_errors"]) == (1, 0, 2)
    assert found["x"]["interval"][0] < found["x"]["wer"] < found["x"]["interval"][1]
    assert (found["x"]["cpu_s"], found["x"]["audio_s"]) == (0.2, 10.0)
    worse, better = [(3, 10), (1, 5), (2, 5)] * 20, [(1, 10), (1, 5), (0, 5)] * 20
    found = proof.difference(better, worse)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["interval"][0] < -0.2 < found["interval"][1] < 0
    assert proof.difference(worse, worse) == {"difference": 0, "interval": [0, 0]}


@pytest.mark.parametrize(("text", "expected"), [
    ("735", ["SEVEN HUNDRED THIRTY FIVE", "SEVEN THREE FIVE", "SEVEN THIRTY FIVE"]),
    ("It's 7:15 p.m.", ["IT'S SEVEN FIFTEEN P M", "IT'S SEVEN ONE FIVE P M"]),
    ("in 1984", ["IN ONE THOUSAND NINE HUNDRED EIGHTY FOUR", "IN ONE NINE EIGHT FOUR", "IN NINETEEN EIGHTY FOUR"]),
    ("007", ["ZERO ZERO SEVEN"]),
    ("the 21st & 5%", ["THE TWENTY FIRST AND FIVE PERCENT"]),
    ("Mr. Smith", ["MISTER SMITH"]),
    ("", [""]),
])  # fmt: skip
def test_readings_of_what_peers_write(text, expected):
    assert [" ".join(reading) for reading in readings(text)] == expected
    assert num_errors("SEVEN THREE FIVE", "736") == 1


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
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    return [line.partition("#")[0].strip() for line in blocks.splitlines() if re.match(r"python|cp", line)]


def game(folder, table, archive):
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


@pytest.fixture
def recipe(tmp_path):
    """A copy of the recipe beside files of the Debian packages with a few lines each, and a function that runs a line
    of the README, scripts through `small.py`, and returns their output."""
    folder, listing = tmp_path / "train_demo", gzip.compress(b"digits/1: one\ngoodbye: Thank you and goodbye.\n")
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("final.pt.xz", "exp", "__pycache__"))
    files = {"games/fortunes/wisdom": b"Never feed a sleeping dragon.\n", "saytime/seven.au": b".snd"}
    files |= {"doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": listing, "doc/anarchism/README": b""}
    files |= {f"asterisk/sounds/en_US_f_Allison/{name}.g722": b"" for name in ("digits/1", "goodbye")}
    for name in ("gcide", "foldoc", "jargon", "devil"):
        files[f"dictd/{name}.dict.dz"] = gzip.compress(f"{name}\n\n   What one finds in it.\n".encode())
    for name in ("librivox/transcription", "cards/cards.transcription"):
        files[f"pocketsphinx/test/data/{name}"] = b"<s> queen of hearts </s> (001)\n"
    write_debian(folder / "debian", files)
    game(folder, "queen.tsv.xz", folder / "debian/usr/share/scummvm/flight-of-the-amazon-queen/queen.1c")
    for name in ("sky", "drascula"):
        (folder / f"{name}.tsv.xz").write_bytes(lzma.compress(COLUMNS.encode()))
    write_monologues(folder / "debian/usr/share/games/uqm/content", folder / "urquan.tsv.xz")
    (folder / "small.py").write_text(SMALL)
    command, environment = [sys.executable, "-W", "ignore", "small.py"], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as scripts:

        def run(line):
            program, *words = line.split()
            if program != "python":
                return subprocess.run([program, *words], cwd=folder, check=True)
            scripts.stdin.write(" ".join(words) + "\n")
            scripts.stdin.flush()
            code, printed = scripts.stdout.readline(), (folder / "printed").read_text()
            assert code == "0\n", f"{line}\n{printed}"
            return printed

        yield folder, run


@pytest.mark.endurance
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes share weights by fork")
def test_the_recipe_runs_from_its_readme(recipe):
    (recipe, run), data = recipe, commands("The data")
    names = "synthesize games urquan fragments revoice prepare teacher testsets withheld"
    assert [line.split()[1] for line in data] == [f"{name}.py" for name in names.split()]
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
