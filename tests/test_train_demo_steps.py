"""Parts of a step of the demo model's recipe: the conditions that are drawn for a batch, and the optimizer."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import random
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))
import augment
import batches
import corpus
import gradients
import objective
import optimizers
import reports


def test_views_are_drawn_to_one_another():
    """Two utterances of 4 and 3 frames, in two views; what follows their ends does not count."""
    torch.manual_seed(1)
    mels, lengths = torch.zeros(2, 24, 80), torch.tensor([24, 18])
    tokens, token_lengths = torch.tensor([[1, 2], [3, -1]]), torch.tensor([2, 1])
    batch = batches.Batch(
        mels=mels, lengths=lengths, tokens=tokens, token_lengths=token_lengths, texts=["A B", "C"]
    ).twice()
    assert batch.texts == ["A B", "C"] * 2
    times = torch.tensor([4, 3, 4, 3])
    logits = torch.randn(2, 4, 5)
    alike = torch.cat((logits, logits)).log_softmax(-1)
    alike[3, 3] = torch.randn(5).log_softmax(-1)
    assert float(objective.consistency(alike, times, batch)) == pytest.approx(0, abs=1e-6)
    logits = torch.randn(4, 4, 5, requires_grad=True)
    before = objective.consistency(logits.log_softmax(-1), times, batch)
    (gradient,) = torch.autograd.grad(before, logits)
    after = objective.consistency((logits - 0.5 * gradient).log_softmax(-1), times, batch)
    assert 0 < float(after.detach()) < float(before.detach())
    assert not gradient[1, 3].any()
    first, second = logits.detach().log_softmax(-1).chunk(2)
    both = (first.exp() - second.exp()) * (first - second)
    assert float(before.detach()) == pytest.approx(float((both[0].sum() + both[1, :3].sum()) / 6), rel=1e-4)


def test_a_step_weighs_the_consistency_of_its_views():
    weights = objective.Objective(ctc_weight=0.5, reverse_weight=0.3, smoothing=0.1, channels=8)
    parts = {"ctc": torch.tensor(2.0), "left": torch.tensor(4.0)}
    assert float(objective.Losses(**parts).total(weights)) == 3
    total = objective.Losses(**parts, consistency=torch.tensor(1.0)).total(weights)
    assert float(total) == pytest.approx(3 + 0.5 * objective.CONSISTENCY)


def test_pieces_of_the_optimizer_are_shared_out_by_their_work():
    pieces = [torch.empty(count, 8, 16) for count in (1, 5, 3, 1, 2)]
    parts = gradients.shares(pieces, 2)
    assert sorted(number for part in parts for number in part) == [*range(5)]
    assert [sum(optimizers.work(pieces[number]) for number in part) for part in parts] == [6 * 8**2 * 40] * 2
    assert gradients.shares(pieces, 1) == [[1, 2, 4, 0, 3]]


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


def test_an_average_begins_anew_where_it_is_told_to():
    torch.manual_seed(1)
    layer = torch.nn.ModuleList([torch.nn.Linear(16, 3), torch.nn.LayerNorm(4)])
    whole, late = optimizers.Optimizer(layer), optimizers.Optimizer(layer, averaged_from=1002)
    masters = []
    for step in range(1000, 1005):
        for optimizer in (whole, late):
            optimizer.step([torch.ones(weight.shape) for weight in layer.parameters()], 0.1, step)
        masters.append(late.masters["0.weight"].detach().clone())
    assert torch.allclose(late.average["0.weight"], torch.stack(masters[2:]).mean(0))
    assert float((whole.average["0.weight"] - masters[-1]).abs().min()) > 0.02


def test_a_rhythm_keeps_the_tempo_on_the_whole():
    torch.manual_seed(1)
    for tempo in (0.85, 1.2):
        for _ in range(20):
            places = batches.rhythm(300, tempo)
            assert places[0] == 0
            assert float(places[-1]) == pytest.approx(299 * tempo, rel=1e-6)
            assert (places.diff() > 0.6 * tempo).all()
            assert (places.diff() < 1.4 * tempo).all()


def test_speakers_differ_but_vowels_keep_their_order():
    factors = augment.tracts(corpus.NUM_MELS, 100)
    assert 0.78 < factors.min() < 0.85
    assert 1.15 < factors.max() < 1.28
    assert factors.std(1).median() > 0.01
    assert ((augment.mel_centers(corpus.NUM_MELS) * factors).diff(dim=1) > 0).all()
    longer = augment.warps(corpus.NUM_MELS, torch.full((1, corpus.NUM_MELS), 1.1))[0]
    resonance = torch.zeros(corpus.NUM_MELS)
    resonance[40] = 1
    found = augment.mel_centers(corpus.NUM_MELS)[(resonance @ longer).argmax()]
    assert float(found) == pytest.approx(float(augment.mel_centers(corpus.NUM_MELS)[40]) / 1.1, rel=0.02)


def test_conditions_are_drawn_for_a_share_of_the_utterances():
    torch.manual_seed(1)
    noise, mels = torch.randn(500, corpus.NUM_MELS), torch.randn(200, 120, corpus.NUM_MELS)
    heard = augment.Augmenter(noise, 0.8)(mels, torch.full((200,), 120))
    changed = (heard != mels).flatten(1).any(1)
    assert 0.7 < changed.float().mean() < 0.9
    assert torch.isfinite(heard).all()


def test_a_run_brings_its_own_logs_to_another_machine(tmp_path):
    for folder in ("run", "dense", "decayed"):
        (tmp_path / folder).mkdir()
    for name in reports.LOGS:
        (tmp_path / "run" / name).write_text("of before\n")
    for folder in ("dense", "decayed"):
        reports.bring_logs(tmp_path / "run/dense.pt", tmp_path / folder)
    assert not any((tmp_path / "decayed").iterdir())
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {*reports.LOGS}
    log = tmp_path / "dense" / reports.LOGS[0]
    log.write_text("of before\nof now\n")
    reports.bring_logs(tmp_path / "run/dense.pt", tmp_path / "dense")
    assert log.read_text() == "of before\nof now\n"


class Words:
    """A tokenizer that knows a word only by its length."""

    def encode(self, text):
        return tuple(len(word) for word in text.split())


def test_some_items_begin_and_end_abruptly_and_some_after_a_pause(tmp_path):
    """70 frames of speech after 30 silent ones and before 50; one clip says nothing, and some words are very short."""
    loudness = [10] * 30 + [200] * 70 + [10] * 50
    with corpus.Pack(tmp_path / "pico-us", corpus.MELS) as pack:
        for number in range(300):
            pack.append(np.full((150, corpus.NUM_MELS), np.array(loudness)[:, None]), str(number), "GO ON")
        pack.append(np.full((150, corpus.NUM_MELS), np.array(loudness)[:, None]), "nobody", "")
        for _ in range(20):
            word = np.array([10] * 25 + [200] * 10 + [10] * 25)
            pack.append(np.full((60, corpus.NUM_MELS), word[:, None]), "short", "A")
    heard = batches.Corpus([tmp_path / "pico-us"], Words())
    items = heard.items(random.Random(1), 200, {})
    kinds = {"abrupt": 0, "drawn out": 0, "as it is": 0}
    for item in items:
        (clip,), (before, behind) = item.clips, item.edges
        batch = heard.batch([item])
        assert int(batch.lengths[0]) == item.num_frames
        if clip.voice == "nobody":
            assert item.edges == (0, 0)
        if clip.voice == "short":
            assert item.num_frames >= min(batches.SHORTEST, int(60 / item.tempo) - 2)
            continue
        for edge, silence in ((before, 30), (behind, 50)):
            kinds["abrupt" if edge < 0 else "drawn out" if edge else "as it is"] += 1
            assert edge < batches.SILENCE
            assert edge >= 0 or int(silence / item.tempo) - batches.CLOSE <= -edge <= silence / item.tempo
        if item.tempo == 1 and clip.voice != "nobody":
            level = batch.mels[0, : item.num_frames, 0]
            speech = (level > corpus.MEL_FLOOR + 100 * corpus.MEL_STEP).nonzero()
            assert int(speech[0]) == 30 + before
            assert item.num_frames - 1 - int(speech[-1]) == 50 + behind
    # 602 edges, a fifth of them each
    assert all(90 < kinds[kind] < 150 for kind in ("abrupt", "drawn out"))
