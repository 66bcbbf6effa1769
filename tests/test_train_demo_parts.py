"""Parts of the demo model's recipe: its data, the optimizer, and the numbers of its evaluation."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))
import evaluate
import games
import optimizers
import proof
import rnc
from readings import num_errors, readings

COLUMNS = "clip\toffset\tsize\tseconds\tspeaker_group\tsplit\tcer\ttext\n"


PACKED = bytes.fromhex(
    "524e43010000000f0000002400000000000140011000000000000808200000000000000101400000000000200400361d616263646566"
)
"""`abcdef`, then 9 bytes that repeat those 3 before, in the format of RNC's method 1."""


def test_packed_clips_of_a_split_are_read_where_the_recording_says(debian):
    assert rnc.unpack(PACKED) == b"abcdefdefdefdef"
    with pytest.raises(ValueError, match="15 bytes instead of 16"):
        rnc.unpack(PACKED[:4] + (16).to_bytes(4, "big") + PACKED[8:])
    with pytest.raises(ValueError, match="must begin with"):
        rnc.unpack(b"ZIP" + PACKED[3:])
    first, second = games.read_lines("sky", "train", debian)
    assert (first.text, first.voice) == ("HELLO YOU", "sky-A")
    assert (second.text, second.voice) == ("AND TWO MORE", "sky-B")
    assert np.array_equal(first.samples, (np.arange(100) - 128) / 128)
    assert len(second.samples) == 15
    assert [line.clip for line in games.read_lines("sky", "train", debian, start=1)] == ["2"]
    assert [line.clip for line in games.read_lines("sky", "dev", debian)] == ["4"]
    (blood,) = games.read_lines("drascula", "train", debian)
    assert blood.samples.tolist() == [0, -1, 127 / 128]


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Two games: one with an archive of clips, one of them compressed, and one with a file for each clip."""
    monkeypatch.setattr(games, "TABLES", tmp_path)
    clips = [bytes(22) + bytes(range(100)), bytes(22) + PACKED]
    folder = tmp_path / "debian/usr/share/scummvm"
    (folder / "beneath-a-steel-sky").mkdir(parents=True)
    (folder / "beneath-a-steel-sky/sky.dsk").write_bytes(b"head" + b"".join(clips))
    places = [f"{4 + number * len(clips[0])}\t{len(clip)}" for number, clip in enumerate(clips)]
    rows = [
        f"1\t{places[0]}\t0.01\tA\ttrain\t0.1\tHello, you!\n",
        f"2\t{places[1]}\t0.01\tB\ttrain\t0.2\tAnd 2 more.\n",
        f"3\t{places[1]}\t0.01\tB\ttrain\t0.7\tNot what is said.\n",
        f"4\t{places[1]}\t0.01\tC\tdev\t0\tFor another day.\n",
        f"5\t{places[1]}\t0.01\tA\ttrain\t0\t...\n",
    ]
    (tmp_path / "sky.tsv.xz").write_bytes(lzma.compress((COLUMNS + "".join(rows)).encode()))
    (folder / "drascula/en").mkdir(parents=True)
    (folder / "drascula/en/D1.ALS").write_bytes(bytes([128, 0, 255]))
    (tmp_path / "drascula.tsv.xz").write_bytes(lzma.compress((COLUMNS + "D1\t0\t3\t0\tD\ttrain\t0\tBlood\n").encode()))
    return tmp_path / "debian"


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
