"""Bundles of random weights from a train.yaml: the weights of the random checkpoint, even routers, and warnings."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from noise import write_noise

from u2moe.export import export_bundle, export_random, parity
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import random_config, random_source, spread_routers, write_random_checkpoint
from u2moe.quantize import inspect_bundle, quantize_bundle, recipe
from u2moe.quantize.inspection import describe
from u2moe.runtime import Bundle, BundleWarning, CheckpointError, Recognizer, UnsupportedError, cli

pytestmark = pytest.mark.slow
MIXTURE = {"mlp_type": "moe", "n_expert": 4, "n_expert_activated": 1}


def recipe_of(folder, **changes):
    """Write a train.yaml like a recipe's: without the sizes that training adds."""
    config = random_config(encoder_conf=MIXTURE, decoder_conf=MIXTURE)
    for name in ("input_dim", "output_dim", "vocab_size"):
        del config[name]
    file = folder / "recipe.yaml"
    file.write_text(yaml.dump(config | changes), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return export_random(recipe_of(folder), folder / "bundle", vocab_size=30, seed=3)


def test_weights_are_those_of_the_random_checkpoint(tmp_path, monkeypatch):
    """The random checkpoint is compared with torch; without experts nothing is adjusted."""
    monkeypatch.setattr(parity, "CHUNKS", ((8, 2),))
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, random_config(), seed=3)
    exported, _ = export_bundle(checkpoint, tmp_path / "exported")
    made = export_random(checkpoint, tmp_path / "made", seed=3)
    graphs = [name for name in made.manifest.files if name.endswith(".onnx")]
    assert [made.manifest.files[name] for name in graphs] == [exported.manifest.files[name] for name in graphs]
    other = export_random(checkpoint / "train.yaml", tmp_path / "other", seed=4)
    assert other.manifest.files["encoder.onnx"] != made.manifest.files["encoder.onnx"]


MEMORY = """
import resource, sys
from pathlib import Path
from u2moe.export import export_random
from u2moe.quantize import Goal, quantize_bundle, recipe

def export(name):
    return export_random(f"{name}/recipe.yaml", f"{name}/bundle")

def quantize(name):
    files = [Path(file) for file in sys.argv[2:]]
    own, goal = recipe("int8", calibration=files), Goal(max_divergence=99)
    quantize_bundle(f"{name}/bundle", f"{name}/int8", own, audio=files[:1], goal=goal)

step = globals()[sys.argv[1]]
step("small")  # includes imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step("large")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units elsewhere")
@pytest.mark.endurance
def test_memory_does_not_grow_with_the_weights(tmp_path):
    """Allow one copy in float32 and one in int8 at the same time, with a report, recordings and a limit."""
    (tmp_path / "sounds").mkdir()
    for name, hidden in (("small", 32), ("large", 3072)):
        (tmp_path / name).mkdir()
        sizes = {"encoder_conf": {"output_size": 256, "linear_units": hidden, "num_blocks": 3, **MIXTURE}}
        config = random_config(**sizes, decoder=None)
        recipe_of(tmp_path / name, **{key: config[key] for key in ("encoder_conf", "decoder")})
    sounds = sorted(write_noise(tmp_path / "sounds", 4, 32_000).iterdir())
    for step, most in {"export": 0.75, "quantize": 1.5}.items():
        command = [sys.executable, "-c", MEMORY, step, *sounds]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        written = sum(file.stat().st_size for file in (tmp_path / "large" / "bundle").iterdir())
        assert written > 1e8
        assert int(done.stdout.split()[-1]) < most * written, step


def largest_shares(network, features):
    """Return for each mixture the share of the tokens of its most popular expert."""
    shares = []

    def count(layer, inputs, _):
        experts, _ = layer.route(inputs[0].reshape(-1, inputs[0].shape[-1]))
        shares.append(float(torch.bincount(experts.flatten(), minlength=4).max() / experts.numel()))

    handles = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, MixtureOfExperts)]
    with torch.no_grad():
        network.encoder(features, torch.tensor([features.shape[1]]))
    for handle in handles:
        handle.remove()
    return shares


def test_routers_spread_tokens_evenly(tmp_path):
    network = random_source(recipe_of(tmp_path), vocab_size=30).network()
    features = torch.randn(1, 400, 80, generator=torch.Generator().manual_seed(9)) * 3 + 11
    before = largest_shares(network, features)
    spread_routers(network)
    after = largest_shares(network, features)
    assert np.mean(after) < 0.35 < np.mean(before)
    assert max(after) < 0.45


def test_a_bundle_says_that_it_is_for_measuring_only(written, tmp_path, capsys):
    content = json.loads((written.path / "bundle.json").read_text(encoding="utf-8"))
    assert content["random_weights"] is True
    assert "random_weights" in content["harmless"]  # older programs go on
    assert written.manifest.model.vocab_size == 30
    with pytest.warns(BundleWarning, match="random weights, for measuring only"):
        Recognizer.from_pretrained(written.path).transcribe(np.zeros(16_000, np.float32))
    quantized, _ = quantize_bundle(written.path, tmp_path / "int8", recipe("int8"))
    assert "weights: random, for measurements only" in describe(inspect_bundle(quantized.path))
    assert (
        cli.main(["export", "--random", str(recipe_of(tmp_path)), str(tmp_path / "bundle"), "--vocab-size", "30"]) == 0
    )
    assert "wrote" in capsys.readouterr().out
    assert Bundle.open(tmp_path / "bundle").manifest.random_weights


@pytest.mark.parametrize(("changes", "vocab_size", "error", "message"), [
    ({"output_dim": 31}, 30, CheckpointError, r"recipe\.yaml: output_dim is 31, which contradicts --vocab-size 30"),
    ({"encoder": "whisper"}, None, UnsupportedError, r"recipe\.yaml: encoder is 'whisper'"),
    ({"dataset_conf": 5}, None, CheckpointError, r"recipe\.yaml: dataset_conf"),
    ({"vocab_size": "many"}, None, CheckpointError, r"recipe\.yaml: output_dim"),
])  # fmt: skip
def test_what_is_refused(tmp_path, changes, vocab_size, error, message):
    with pytest.raises(error, match=message):
        export_random(recipe_of(tmp_path, **changes), tmp_path / "bundle", vocab_size=vocab_size)
    assert not (tmp_path / "bundle").exists()


def test_options_that_do_not_go_together(tmp_path, capsys):
    file = str(recipe_of(tmp_path))
    assert cli.main(["export", file, str(tmp_path / "out"), "--seed", "1"]) == 1
    assert "--vocab-size and --seed require --random" in capsys.readouterr().err
    assert cli.main(["export", "--random", file, str(tmp_path / "out"), "--units", "units.txt"]) == 1
    assert "--random cannot be combined with --weights" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"list\.yaml: is not a mapping"):
        export_random(tmp_path / "list.yaml", tmp_path / "out")
