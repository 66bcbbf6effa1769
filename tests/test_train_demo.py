"""The recipe of the demo model, on seconds of noise: it trains, and a resumed run takes the same steps."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("scipy")
pytest.importorskip("sentencepiece")
import torch

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
sys.path.insert(0, str(RECIPE))
import batches
import checkpoints
import corpus
import data
import gradients
import lessons
import network
import objective
import prepare
import progress
import routing
import train
import upcycle
import wenet
import yaml
from schedule import Schedule
from withheld import TESTS, Withheld, overlap

from u2moe.export.architecture import FeedForward
from u2moe.export.model import SpeechModel
from u2moe.export.moe import DenseFeedForward, MixtureOfExperts
from u2moe.export.training_config import parse_training_config

pytestmark = pytest.mark.slow

WORDS = ["GO FORWARD TEN METERS", "STOP", "TURN LEFT NOW", "OPEN THE KITCHEN DOOR", "ONE TWO THREE FOUR"]


def small_config(experts=0):
    config = yaml.safe_load((RECIPE / "dense.yaml").read_text(encoding="utf-8"))
    config["encoder_conf"] |= {"output_size": 16, "linear_units": 32, "num_blocks": 2}
    config["decoder_conf"] |= {"linear_units": 32}
    if experts:
        for part in ("encoder_conf", "decoder_conf"):
            config[part] |= {"linear_units": 16, "mlp_type": "moe", "n_expert": experts, "n_expert_activated": 2}
    return config


def speech_model(config):
    sizes = {"input_dim": 80, "output_dim": 30, "vocab_size": 30}
    return SpeechModel(parse_training_config(config | sizes).architecture)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """Packs of noise with texts, a vocabulary, a test set and a small network's configuration."""
    folder = tmp_path_factory.mktemp("exp")
    rng = np.random.default_rng(1)
    for name, count in (("hibari", 12), ("pico-us", 12), ("espeak", 6), ("queen-dev", 4), ("heldout", 4)):
        with corpus.Pack(folder / "features" / name, corpus.MELS) as pack:
            for number in range(count):
                shape = (int(rng.integers(120, 240)), corpus.NUM_MELS)
                pack.append(rng.integers(60, 160, shape), name, WORDS[number % len(WORDS)])
    with corpus.Pack(folder / "features" / "noise", corpus.MELS) as pack:
        pack.append(rng.integers(60, 160, (3000, corpus.NUM_MELS)), "noise", "-")
    (folder / "test").mkdir()
    for name in TESTS:
        (folder / "test" / f"{name}.tsv").write_text("a.flac\tONE TWO THREE FOUR\n", encoding="utf-8")
    prepare.write_vocabulary(WORDS * 20, folder, num_pieces=30)
    (folder / "small.yaml").write_text(yaml.safe_dump(small_config()), encoding="utf-8")
    return folder


def run(folder, name, until_step, *more):
    arguments = ["--work-dir", folder, "--config", folder / "small.yaml", "--name", name, "--until-step", until_step]
    options = ["--batch-frames", 800, "--num-batches", 2, "--report-steps", 2]
    train.main([str(argument) for argument in [*arguments, *options, *more]])
    return checkpoints.load(checkpoints.all_of(folder / name)[-1])


def differences(first, second):
    pairs = ((value, second["optimizer"]["masters"][name]) for name, value in first["optimizer"]["masters"].items())
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(autouse=True)
def no_easy_phase(monkeypatch):
    monkeypatch.setattr(train, "EASY_UNTIL", 1e9)


def test_a_resumed_run_takes_the_same_steps(work_dir):
    whole = run(work_dir, "whole", 12)
    run(work_dir, "parts", 5)
    parts = run(work_dir, "parts", 12, "--resume")
    assert whole["progress"]["epoch"] >= 1
    assert differences(whole, parts) == 0
    for name in ("step", "batches", "epoch", "position", "ctc", "speech_seconds"):
        assert whole["progress"][name] == parts["progress"][name]
    assert torch.equal(*(next(iter(run["optimizer"]["average"].values())) for run in (whole, parts)))


@pytest.mark.endurance
def test_two_views_are_heard_by_any_number_of_processes(work_dir, monkeypatch):
    seen, losses = [], gradients.losses
    monkeypatch.setattr(gradients, "losses", lambda *arguments: seen.append(arguments[3]) or losses(*arguments))
    two = run(work_dir, "views", 16, "--views", 2)
    assert 2 in {len(chunk_sizes) for chunk_sizes in seen}  # from the second epoch on
    assert differences(two, run(work_dir, "views-shared", 16, "--views", 2, "--processes", 2)) == 0


@pytest.mark.endurance
def test_a_run_may_get_a_teacher_and_goes_on_with_it(work_dir, capsys):
    rng = np.random.default_rng(2)
    width = corpus.TARGETS.width
    (work_dir / "targets").mkdir()
    basis = lessons.Basis(*(np.ones(shape, np.float32) for shape in (width, (width, width), width)))
    basis.save(work_dir / "targets" / lessons.BASIS)
    for name in ("pico-us", "queen-dev"):
        with corpus.Pack(work_dir / "targets" / name, corpus.TARGETS) as pack:
            for entry in corpus.Pack(work_dir / "features" / name, corpus.MELS).utterances:
                pack.append(rng.integers(-60, 60, (entry.length // 4 + 1, width)), entry.voice, entry.text)
    run(work_dir, "untaught", 5)
    start = checkpoints.all_of(work_dir / "untaught")[-1]
    taught = ("--start", start, "--teacher-weight", 2, "--processes", 2, "--validate-every", 0)
    capsys.readouterr()
    whole = run(work_dir, "taught", 9, *taught)
    lines = [line for line in capsys.readouterr().out.splitlines() if " teacher " in line]
    assert any("queen-dev" in line for line in lines)
    assert not any("heldout" in line for line in lines)
    run(work_dir, "taught-parts", 7, *taught)
    assert differences(whole, run(work_dir, "taught-parts", 9, "--resume")) == 0
    assert whole["options"]["teacher_weight"] == 2
    assert differences(run(work_dir, "untaught", 9, "--resume"), whole) > 0


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("experts", [0, 4])
def test_the_network_of_the_training_computes_what_the_exported_one_does(experts, chunk_size):
    torch.manual_seed(1)
    model = speech_model(small_config(experts))
    network.narrow_front(model, 5)
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.1)
    network.narrow_front(model, 5)
    mels, lengths = torch.randn(3, 192, 80), torch.tensor([192, 150, 100])
    with torch.no_grad():
        expected, times = model.encoder(mels, lengths, chunk_size)
        found, found_times = network.encode(model.encoder, mels, lengths, chunk_size, 5)
        valid = torch.arange(expected.shape[1]) < times.unsqueeze(1)
        assert torch.equal(times, found_times)
        # float32 sums in another order; values are about 1
        assert float((expected - found)[valid].abs().max()) < 2e-5
        inputs, input_lengths = torch.randint(30, (3, 9)), torch.tensor([9, 4, 1])
        inside = torch.arange(9) < input_lengths.unsqueeze(1)
        for decoder in (model.left_decoder, model.right_decoder):
            logits = decoder(inputs, input_lengths, expected, valid)
            own = network.decode(decoder, inputs, input_lengths, expected, times)
            assert float((logits - own)[inside].abs().max()) < 2e-5


@pytest.mark.parametrize("activation", ["swish", "relu"])
@pytest.mark.parametrize("favourite", [None, 2])
def test_a_mixture_and_its_gradients_are_those_of_the_exported_one(favourite, activation):
    torch.manual_seed(1)
    experts = {"num_experts": 6, "num_experts_per_token": 2}
    config = FeedForward(kind="moe", hidden=24, activation=activation, bias=True, **experts)
    layer = MixtureOfExperts(16, config).eval()
    inputs = torch.randn(5, 31, 16, requires_grad=True)
    if favourite is not None:  # some experts get every token, others none
        with torch.no_grad():
            layer.gate.weight.zero_()
            layer.gate.weight[favourite] = 1.0
            inputs.abs_()
    real = torch.rand(5, 31) < 0.8
    weights = torch.randn(5, 31, 16) * real.unsqueeze(-1)
    found = []
    for function in (lambda x: layer(x) * real.unsqueeze(-1), lambda x: routing.mixture(layer, x, real)):
        output = function(inputs)
        gradients = torch.autograd.grad((output * weights).sum(), [inputs, *layer.parameters()], allow_unused=True)
        found.append([output, *gradients])
    for first, second in zip(*found, strict=True):
        # an expert without tokens; float32 sums of up to 310 products of about 1, in another order
        assert torch.allclose(torch.zeros_like(second) if first is None else first, second, rtol=1e-4, atol=1e-4)


def test_every_layer_of_experts_takes_frames_and_tokens_that_are_no_padding(monkeypatch):
    config = small_config(4)
    model = speech_model(config).train()
    lengths, token_lengths = torch.tensor([192, 100]), torch.tensor([9, 2])
    tokens = torch.randint(3, 29, (2, 9)).masked_fill(torch.arange(9) >= token_lengths.unsqueeze(1), -1)
    sizes = {"lengths": lengths, "token_lengths": token_lengths}
    batch = batches.Batch(mels=torch.randn(2, 192, 80), tokens=tokens, texts=["", ""], **sizes)
    taken = []
    monkeypatch.setattr(routing, "load_loss", lambda logits, counts: taken.append(int(counts.sum())) or logits.sum())
    own = objective.Objective.of(config["model_conf"], channels=5)
    _, _, times = objective.losses(model, batch, own, [None], (False, True))
    each = [2 * int(times.sum())] * 4 + [2 * int((token_lengths + 1).sum())] * 2  # two experts for each, and eos
    assert taken == each


def test_a_mixture_out_of_a_dense_network_computes_the_same():
    torch.manual_seed(1)
    config = small_config()
    dense, mixture = speech_model(config), speech_model(upcycle.mixture_config(config))
    weights = dict(dense.named_parameters())
    generator = torch.Generator().manual_seed(1)
    layers = [name for name, layer in dense.named_modules() if isinstance(layer, DenseFeedForward)]
    rows = {name: torch.randn(4, weights[f"{name}.w_1.weight"].shape[1], generator=generator) for name in layers}
    mixture.load_state_dict(upcycle.upcycled(weights, rows, 0.0, generator), strict=False)
    mels, lengths = torch.randn(2, 192, 80), torch.tensor([192, 150])
    with torch.no_grad():
        first, second = (model.encoder(mels, lengths)[0] for model in (dense, mixture))
        assert float((first - second).abs().max()) < 2e-5
        mixture.load_state_dict(upcycle.upcycled(weights, rows, 0.1, generator), strict=False)
        assert float((first - mixture.encoder(mels, lengths)[0]).abs().max()) > 1e-3


@pytest.mark.endurance
def test_an_upcycled_run_goes_on(work_dir, monkeypatch):
    run(work_dir, "before", 4)
    path = checkpoints.all_of(work_dir / "before")[-1]
    monkeypatch.setattr(sys, "argv", ["upcycle.py", str(path), "--work-dir", str(work_dir), "--dense", "before"])
    source, heard = gradients.GradientSource, []
    losses = source.losses
    monkeypatch.setattr(source, "losses", lambda own, task: heard.append(task.items) or losses(own, task))
    upcycle.main()
    assert {len(items) for items in heard} == {1}  # clusters are of real tokens: nothing is padded
    after = run(work_dir, "mixture", 6, "--resume")
    assert after["progress"]["step"] == 6
    assert after["options"]["restart"] == 4
    assert len(after["optimizer"]["parts"]) == 3  # routers have a rate of their own
    assert any(".experts.7.w_1.weight" in name for name in after["optimizer"]["masters"])


def test_a_checkpoint_need_not_keep_what_a_finished_model_has(work_dir, tmp_path, monkeypatch):
    exact = run(work_dir, "finished", 4)
    model, small = tmp_path / "model", tmp_path / "small.pt"
    command = ["wenet.py", "--work-dir", str(work_dir), "--name", "finished", "--output", str(model)]
    monkeypatch.setattr(sys, "argv", command)
    wenet.main()
    checkpoints.save_compact(exact, small, model)
    assert small.stat().st_size < 0.1 * (model / "final.pt").stat().st_size
    restored = checkpoints.load(small, model)["optimizer"]["masters"]
    whole = checkpoints.unpacked(checkpoints.compact(exact))["optimizer"]["masters"]
    assert restored.keys() == whole.keys()
    assert all(torch.equal(restored[name], weight) for name, weight in whole.items())
    weights = torch.load(model / "final.pt", weights_only=True)
    checkpoints.pack(model)
    assert {file.name for file in model.glob("*.*")} == {"final.pt.xz", "bpe.model.xz", "units.txt", "train.yaml"}
    text = "HELLO WORLD"
    assert batches.Tokenizer(model).encode(text) == batches.Tokenizer(work_dir).encode(text)
    assert run(work_dir, "from-small", 6, "--start", small, "--model", model)["progress"]["step"] == 6
    with pytest.raises(ValueError, match=r"final\.pt with SHA-256"):
        checkpoints.load(small)
    weights["ctc.ctc_lo.weight"] += 1
    torch.save(weights, model / "final.pt")
    with pytest.raises(ValueError, match=r"final\.pt with SHA-256"):
        checkpoints.load(small, model)
    with pytest.raises(ValueError, match="is not the average of the weights at step 4"):
        checkpoints.save_compact(exact, small, model)


def test_the_rate_rises_stays_and_falls():
    schedule = Schedule(peak=1.0, warmup_steps=10, decay_from=100, decay_steps=50)
    assert [schedule.rate(step) for step in (0, 9, 50, 99)] == pytest.approx([0.1, 1, 1, 1])
    falling = [schedule.rate(step) for step in range(100, 150)]
    assert falling == sorted(falling, reverse=True)
    assert schedule.rate(149) == 0
    assert schedule.end == 150
    assert Schedule(peak=1.0, warmup_steps=10).end is None


def test_sentences_of_the_tests_are_withheld_from_training(work_dir):
    withheld = Withheld(["GO FORWARD TEN METERS", "ONE TWO"])
    assert not withheld.allows("PLEASE GO FORWARD TEN METERS NOW")
    assert withheld.allows("GO FORWARD TEN FEET")
    assert withheld.allows("ONE TWO THREE")
    assert overlap(["A B C", "C D"], ["X A B", "Y"], 2) == pytest.approx(1 / 3)
    heard = data.Data(work_dir, progress.Options())
    texts = {clip.text for clips in heard.corpus(progress.Progress()).clips for clip in clips}
    assert texts == {*WORDS} - {"ONE TWO THREE FOUR"}
