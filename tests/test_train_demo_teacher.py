"""The teacher of the demo model's recipe: what it makes of recordings, and how the network answers it."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
pytest.importorskip("soundfile")
torch = pytest.importorskip("torch")

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
sys.path.insert(0, str(RECIPE))
import batches
import checkpoints
import corpus
import gradients
import lessons
import network
import objective
import optimizers
import reports
import teacher
import voices
import yaml

from u2moe.export.model import SpeechModel
from u2moe.export.training_config import parse_training_config

WIDTH = corpus.TARGETS.width


class Clock:
    """A teacher whose rows say which of them it is, and how loud it is there."""

    def rows(self, window):
        assert len(window) == teacher.WINDOW
        loudness = window.reshape(-1, corpus.TARGET_ROW).max(1)
        return np.stack([np.arange(len(loudness), dtype=np.float32), loudness], 1)


def small_model():
    config = yaml.safe_load((RECIPE / "dense.yaml").read_text(encoding="utf-8"))
    config["encoder_conf"] |= {"output_size": 16, "linear_units": 32, "num_blocks": 4}
    config["decoder_conf"] |= {"linear_units": 32}
    sizes = {"input_dim": corpus.NUM_MELS, "output_dim": 30, "vocab_size": 30}
    return SpeechModel(parse_training_config(config | sizes).architecture)


def test_every_recording_gets_the_rows_that_hear_it(tmp_path):
    """Recordings of 1 to 9 s, loud all through and each at a level of its own; windows never cut one."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(16000, 9 * 16000, 20)
    with corpus.Pack(tmp_path / "a", corpus.SPEECH) as pack:
        for number, length in enumerate(lengths):
            pack.append(np.full(length, 1000 * (number + 1)), "voice", str(number))
    heard = list(teacher.lessons(Clock(), pack, pack.utterances))
    assert [entry.text for entry, _ in heard] == [str(number) for number in range(20)]
    for number, (_, rows) in enumerate(heard):
        assert len(rows) == teacher.num_rows(lengths[number])
        assert rows[:, 1] == pytest.approx(1000 * (number + 1) / 32768)
        assert (np.diff(rows[:, 0]) == 1).all()
    starts = [rows[0, 0] for _, rows in heard]
    assert starts.count(0) > 2
    assert max(starts) * corpus.TARGET_ROW > teacher.WINDOW / 2


def test_only_what_is_new_is_heard(tmp_path, monkeypatch):
    matrix = np.zeros((2, WIDTH), np.float32)
    matrix[1] = 1
    lessons.Basis(np.zeros(2, np.float32), matrix, np.ones(WIDTH, np.float32)).save(tmp_path / lessons.BASIS)
    (tmp_path / "speech").mkdir()
    told = []
    for loudness in (8000, 16000):
        with corpus.Pack(tmp_path / "speech" / "a", corpus.SPEECH) as pack:
            pack.append(np.full(16000, loudness), "voice", str(loudness))
        monkeypatch.setattr(teacher, "Teacher", lambda _: Clock())
        teacher.teach(tmp_path, tmp_path / "speech" / "a", tmp_path)
        targets = corpus.Pack(tmp_path / "a", corpus.TARGETS)
        told.append([entry.text for entry in targets.utterances])
    assert told == [["8000"], ["8000", "16000"]]
    assert targets.map()[0, 0] == round(8000 / 32768 * 127 / lessons.LIMIT)
    assert targets.map()[-1, 0] == round(16000 / 32768 * 127 / lessons.LIMIT)


def test_every_sentence_of_kokoro_has_a_voice_within_reach_of_its_styles():
    drawn = np.stack([voices.kokoro_other(number, 5) for number in range(300)])
    np.testing.assert_allclose(drawn.sum(2), 1)
    assert drawn.min() >= (1 - 1.5) / 5  # half as far again from the middle as a style without that share
    assert drawn.min() < -0.05
    assert len(np.unique(drawn.reshape(600, 5).round(6), axis=0)) == 600


def test_a_basis_keeps_what_varies(tmp_path):
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((4000, 2)) * [3, 1]
    rows = (hidden @ rng.standard_normal((2, WIDTH + 20)) + 0.01 * rng.standard_normal((4000, WIDTH + 20)) + 5).astype(
        np.float32
    )
    basis = lessons.Basis.of(rows)
    basis.save(tmp_path / "basis.npz")
    basis = lessons.Basis.load(tmp_path / "basis.npz")
    targets = basis(rows) * basis.scale
    assert targets.var(0).sum() == pytest.approx(1, rel=0.02)
    assert targets[:, :2].var(0).sum() > 0.98
    assert (basis(rows).std(0)[:2] > 20).all()


@pytest.fixture
def taught(tmp_path):
    """Targets that say where in a recording of 4 s they are, in parts of a row; of `queen-train` and of `pico-us`."""
    spread = np.full(WIDTH, 1, np.float32)
    basis = lessons.Basis(np.zeros(WIDTH, np.float32), np.eye(WIDTH, dtype=np.float32), spread)
    (tmp_path / "targets").mkdir()
    basis.save(tmp_path / "targets" / lessons.BASIS)
    for name in ("queen-train", "pico-us"):
        with corpus.Pack(tmp_path / "targets" / name, corpus.TARGETS) as pack:
            for text in ("ONE", "TWO"):
                pack.append(np.repeat(np.arange(100)[:, None], WIDTH, 1), "voice", text)
    return tmp_path / "targets", float(basis.scale[0])


def rows_of(count, texts):
    return [corpus.Utterance(offset=0, length=count, voice="voice", text=text) for text in texts]


def test_variants_share_the_targets_of_their_recording(taught):
    """Five at other speeds of each actor's recording, three with other tracts; one of a synthetic voice."""
    folder, scale = taught
    for name, copies in (("queen-train", 5), ("queen-train-revoiced", 3), ("pico-us", 1)):
        texts = ["ONE"] * copies + ["TWO"] * copies + ["NOT HEARD YET"]
        for num_frames in (398, 350, 440):
            found = lessons.Lessons(folder, name, rows_of(num_frames, texts))
            assert found(2 * copies, torch.arange(5.0), num_frames).isnan().all()
            for number in (0, 2 * copies - 1):
                places = torch.tensor([10.0, num_frames / 2, num_frames - 11.0])
                seconds = 3.98 * (0.01 * places + 0.0125) / (0.01 * num_frames + 0.015)  # the last row is half full
                at = found(number, places, num_frames)[:, 0] / scale
                assert at.tolist() == pytest.approx(((seconds - 0.01) / 0.04).tolist(), abs=0.02)
        with pytest.raises(ValueError, match=r"utterance 1 of .* is not what the teacher heard: 'SIX'"):
            lessons.Lessons(folder, name, rows_of(398, ["ONE", "SIX", "TWO"]))


def test_a_batch_has_targets_for_the_frames_of_the_encoder(tmp_path, taught):
    """Two utterances that follow one another, and one that the teacher has not heard, at other tempi."""
    folder, scale = taught
    with corpus.Pack(tmp_path / "pico-us", corpus.MELS) as pack:
        for text in ("ONE", "TWO", "NOT HEARD"):
            pack.append(np.zeros((398, corpus.NUM_MELS)), "pico-us", text)

    class Letters:
        def encode(self, text):
            return tuple(range(len(text)))

    heard = batches.Corpus([tmp_path / "pico-us"], Letters(), targets=folder)
    first, second, third = heard.clips[0]
    assert batches.Corpus([tmp_path / "pico-us"], Letters()).batch([batches.Item([first], 1.0)]).targets is None
    for tempo in (1.0, 1.2):
        batch = heard.batch([batches.Item([first, second], tempo), batches.Item([third], tempo)])
        count = batches.num_frames(first, tempo)
        assert batch.targets.shape == (2, batch.mels.shape[1] // 6, WIDTH)
        assert batch.targets[1].isnan().all()
        told = batch.targets[0, :, 0] / scale
        assert int((~told.isnan()).sum()) == 2 * count // 6
        middles = 6 * torch.arange(2 * count // 6) + 5
        seconds = 3.98 * (0.01 * tempo * (middles % count) + 0.0125) / 3.995
        # a tempo of 1.2 comes and goes by up to 30 % within 2 s
        assert float((told[: len(seconds)] - (seconds - 0.01) / 0.04).abs().max()) < (0.02 if tempo == 1 else 9)
    twice = batch.twice()
    assert torch.equal(twice.targets[2:].nan_to_num(), batch.targets.nan_to_num())


def test_the_network_answers_one_frame_later_where_there_are_targets():
    targets = torch.randn(2, 5, WIDTH)
    targets[1, 2] = torch.nan
    states = torch.zeros(2, 4, WIDTH)  # one frame less than targets: the front end needs more than its share
    states[:, 1:] = targets[:, :3].nan_to_num(7.0)
    states[1, 3], states[0, 0] = 9.0, 9.0
    times = torch.tensor([4, 3])
    answer = torch.nn.Identity()
    assert float(objective.teacher_loss(answer, states, times, targets)) == 0
    states[0, 3] += 0.5
    assert float(objective.teacher_loss(answer, states, times, targets)) == pytest.approx(0.25 * WIDTH / 5)
    assert objective.teacher_loss(answer, states, times, torch.full_like(targets, torch.nan)) is None


def test_the_teacher_is_weighed_beside_the_words():
    weights = objective.Objective(ctc_weight=0.5, reverse_weight=0.3, smoothing=0.1, channels=8, teacher_weight=3.0)
    parts = {"ctc": torch.tensor(2.0), "left": torch.tensor(4.0)}
    assert float(objective.Losses(**parts).total(weights)) == 3
    assert float(objective.Losses(**parts, teacher=torch.tensor(0.5)).total(weights)) == 4.5
    assert float(objective.Losses(ctc=torch.tensor(2.0), teacher=torch.tensor(0.5)).total(weights)) == 3.5


def test_a_run_gets_a_head_and_loses_it_again():
    """The other weights and their moments stay; what ships has no head."""
    torch.manual_seed(1)
    without, with_head = small_model(), small_model()
    network.add_head(with_head, WIDTH)
    before, after = optimizers.Optimizer(without), optimizers.Optimizer(with_head)
    gradients = [torch.randn(weight.shape) for weight in without.parameters()]
    before.step(gradients, 0.1, 5)
    after.load_state_dict(before.state_dict())
    own = {name: weight.clone() for name, weight in after.masters.items() if name.startswith(network.HEAD)}
    assert set(own) == {"teacher.weight", "teacher.bias"}
    assert all(torch.equal(weight, after.masters[name]) for name, weight in before.masters.items())
    gradients = [torch.randn(weight.shape) for weight in with_head.parameters()]
    after.step(gradients, 0.1, 6)
    assert all(not torch.equal(weight, after.masters[name]) for name, weight in own.items())
    again = optimizers.Optimizer(small_model())
    again.load_state_dict(after.state_dict())
    assert "teacher.weight" not in again.masters
    names = [name for name, _ in without.named_parameters()]
    again.step([gradient for (name, _), gradient in zip(with_head.named_parameters(), gradients, strict=True)
                if name in names], 0.1, 7)  # fmt: skip
    exact = after.state_dict()
    kept = optimizers.Optimizer(with_head)
    kept.load_state_dict(exact)
    assert torch.equal(kept.masters["teacher.weight"], after.masters["teacher.weight"])
    state = {"optimizer": exact, "progress": {"epoch": 1}, "options": {}}
    assert "teacher.weight" in checkpoints.compact(state)["optimizer"]["average"]  # a run goes on with it


def test_the_log_tells_the_distance_from_a_teacher_if_there_is_one():
    report, nan = reports.Report(), float("nan")
    report.add([gradients.Outcome(ctc=2.0, left=1.0, right=nan, teacher=nan, num_frames=100)], 1.0)
    assert "right" not in str(report)
    assert "teacher" not in str(report)
    report.add([gradients.Outcome(ctc=4.0, left=nan, right=1.0, teacher=0.5, num_frames=100)], 2.0)
    assert "ctc 3.000 left 1.000 right 1.000 teacher 0.500 grad 1.50" in str(report)
