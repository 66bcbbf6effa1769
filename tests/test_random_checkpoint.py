"""Random checkpoints, also for WeNet; bundles with random weights; bundles depend only on the checkpoint."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml
from corpora import write_noise

from u2moe.export import export_random
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import (
    PRESETS,
    num_parameters,
    random_config,
    random_source,
    spread_routers,
    write_random_checkpoint,
)
from u2moe.quantize import RECIPES, inspect_bundle, quantize_bundle, recipe
from u2moe.quantize.inspection import describe
from u2moe.runtime import Bundle, BundleWarning, CheckpointError, Recognizer, UnsupportedError, cli
from u2moe.runtime.bundle_location import DEMO_FOLDER

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
PUBLISHED = TESTS.parent / "examples" / "train_demo" / "checkpoint"
NEEDED = """input_dim output_dim encoder_conf decoder_conf model_conf tokenizer dataset_conf.filter_conf
    dataset_conf.batch_conf dataset_conf.fbank_conf tokenizer_conf.symbol_table_path tokenizer_conf.non_lang_syms_path
    tokenizer_conf.bpe_path cmvn_conf.cmvn_file cmvn_conf.is_json_cmvn"""
"""Keys that wenet/bin/recognize.py of WeNet's main branch (December 2025) reads without a default."""
LAYERS = """mlp_type mlp_bias n_expert n_expert_activated attention_heads query_bias key_bias value_bias n_kv_head
    use_sdpa linear_units num_blocks dropout_rate positional_dropout_rate input_layer normalize_before norm_eps
    activation_type gradient_checkpointing layer_norm_type head_dim"""
KEYWORDS = {
    "encoder_conf": f"""{LAYERS} output_size attention_dropout_rate pos_enc_layer_type static_chunk_size final_norm
        use_dynamic_chunk use_dynamic_left_chunk positionwise_conv_kernel_size macaron_style selfattention_layer_type
        use_cnn_module cnn_module_kernel causal cnn_module_norm conv_bias conv_norm_eps conv_inner_factor""",
    "decoder_conf": f"""{LAYERS} r_num_blocks self_attention_dropout_rate src_attention_dropout_rate use_output_layer
        src_attention tie_word_embedding""",
    "model_conf": "ctc_weight ignore_id reverse_weight lsm_weight length_normalized_loss apply_non_blank_embedding",
    "dataset_conf.filter_conf": """max_length min_length token_max_length token_min_length min_output_input_ratio
        max_output_input_ratio""",
    "dataset_conf.fbank_conf": "num_mel_bins frame_length frame_shift dither window_type",
    "dataset_conf.resample_conf": "resample_rate",
}
"""Keys that it passes on as keyword arguments, where any other is a TypeError."""
CONFIGS = {name: yaml.dump(random_config(**preset)) for name, preset in PRESETS.items()}
CONFIGS["demo"] = (PUBLISHED / "train.yaml").read_text(encoding="utf-8")


def value_at(config, path):
    for key in path.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_wenet_finds_its_keys(name):
    config = yaml.safe_load(CONFIGS[name])
    for path in NEEDED.split():
        value_at(config, path)
    for path, known in KEYWORDS.items():
        assert value_at(config, path).keys() <= set(known.split()), path
    assert config["cmvn"] == "global_cmvn"
    assert config["tokenizer"] in ("char", "bpe")
    assert config["vocab_size"] == config["output_dim"]


def test_wenet_finds_the_files_of_the_demo():
    """recognize.py opens them by these names, relative to its working directory, after `xz -d *.xz`."""
    config = yaml.safe_load(CONFIGS["demo"])
    files = [value_at(config, path) for path in ("tokenizer_conf.symbol_table_path", "cmvn_conf.cmvn_file")]
    files += [config["tokenizer_conf"]["bpe_path"]] * (config["tokenizer"] == "bpe")
    assert set(files) <= {file.name.removesuffix(".xz") for file in PUBLISHED.iterdir()}


@pytest.mark.parametrize(("preset", "millions", "active"), [
    ("tiny", 1.24, 0.57), ("dense-225m", 223.5, 223.5), ("moe-1b", 1060.7, 343.1), ("dense-1b", 1061.0, 1061.0),
])  # fmt: skip
def test_sizes_of_the_presets(preset, millions, active):
    config = random_config(**PRESETS[preset])
    assert num_parameters(config) / 1e6 == pytest.approx(millions, rel=0.01)
    assert num_parameters(config, active=True) / 1e6 == pytest.approx(active, rel=0.01)
    if preset == "moe-1b":
        for section in ("encoder_conf", "decoder_conf"):
            for key in ("mlp_type", "n_expert", "n_expert_activated"):
                del config[section][key]
        assert config == random_config(**PRESETS["dense-225m"])


def encoded(network, features, told):
    """Return the encoder's output, and for each mixture what `told` says of the chosen experts [tokens, top_k]."""
    routed = []

    def record(layer, inputs, _):
        routed.append(told(layer.route(inputs[0].reshape(-1, inputs[0].shape[-1]))[0]))

    handles = [part.register_forward_hook(record) for part in network.modules() if isinstance(part, MixtureOfExperts)]
    with torch.no_grad():
        output, _ = network.encoder(features, torch.tensor([features.shape[1]]))
    for handle in handles:
        handle.remove()
    return output, routed


def test_activations_and_routers_stay_healthy_through_many_blocks(tmp_path):
    conf = {"num_blocks": 12, "mlp_type": "moe", "output_size": 64, "linear_units": 96}
    write_random_checkpoint(tmp_path, random_config(encoder_conf=conf))
    features = torch.rand(1, 400, 80, generator=torch.Generator().manual_seed(0)) * 12 + 5
    output, routed = encoded(Checkpoint.open(tmp_path).network(), features, lambda experts: experts.unique().numel())
    assert 0.5 < output.std() < 2
    assert output.std(dim=1).mean() > 0.4 * output.std()
    assert sum(routed) > 0.8 * 8 * len(routed)


MIXTURE = {"mlp_type": "moe", "n_expert": 4, "n_expert_activated": 1}


def recipe_of(folder, **changes):
    config = random_config(encoder_conf=MIXTURE, decoder_conf=MIXTURE)
    for name in ("input_dim", "output_dim", "vocab_size"):
        del config[name]
    file = folder / "recipe.yaml"
    file.write_text(yaml.dump(config | changes), encoding="utf-8")
    return file


def test_routers_spread_tokens_evenly(tmp_path):
    network = random_source(recipe_of(tmp_path), vocab_size=30).network()
    features = torch.randn(1, 400, 80, generator=torch.Generator().manual_seed(9)) * 3 + 11

    def largest_shares():
        return encoded(network, features, lambda chosen: float(chosen.flatten().bincount().max() / chosen.numel()))[1]

    before = largest_shares()
    spread_routers(network)
    after = largest_shares()
    assert np.mean(after) < 0.35 < np.mean(before)
    assert max(after) < 0.45


def test_weights_are_those_of_the_random_checkpoint(export_quickly, tmp_path):
    """Without experts nothing is adjusted."""
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, random_config(), seed=3)
    exported = Bundle.open(export_quickly(checkpoint, tmp_path / "exported"))
    made = export_random(checkpoint, tmp_path / "made", seed=3)
    graphs = [name for name in made.manifest.files if name.endswith(".onnx")]
    assert [made.manifest.files[name] for name in graphs] == [exported.manifest.files[name] for name in graphs]
    other = export_random(checkpoint / "train.yaml", tmp_path / "other", seed=4)
    assert other.manifest.files["encoder.onnx"] != made.manifest.files["encoder.onnx"]


def test_weights_of_the_front_end_are_opposite_pairs_and_the_last_of_an_odd_number_is_alone(tmp_path):
    write_random_checkpoint(tmp_path, random_config(encoder_conf={"input_layer": "linear"}, num_mel_bins=23))
    weight = torch.load(tmp_path / "final.pt", weights_only=True)["encoder.embed.out.0.weight"]
    assert torch.equal(weight[:, 1::2], -weight[:, :22:2])


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


def test_a_bundle_says_that_it_is_for_measuring_only(tmp_path, capsys):
    command = ["export", "--random", str(recipe_of(tmp_path)), str(tmp_path / "bundle"), "--vocab-size", "30"]
    assert cli.main(command) == 0
    assert "wrote" in capsys.readouterr().out
    written = Bundle.open(tmp_path / "bundle")
    assert written.manifest.random_weights
    content = json.loads((written.path / "bundle.json").read_text(encoding="utf-8"))
    assert content["random_weights"] is True
    assert "random_weights" in content["harmless"]  # older programs go on
    assert written.manifest.model.vocab_size == 30
    with pytest.warns(BundleWarning, match="random weights, for measuring only"):
        Recognizer.from_pretrained(written.path).transcribe(np.zeros(16_000, np.float32))
    quantized, _ = quantize_bundle(written.path, tmp_path / "int8", recipe("int8"))
    assert "weights: random, for measurements only" in describe(inspect_bundle(quantized.path))


@pytest.mark.parametrize(("changes", "vocab_size", "error", "message"), [
    ({"output_dim": 31}, 30, CheckpointError, r"recipe\.yaml: output_dim is 31, which contradicts --vocab-size 30"),
    ({"encoder": "whisper"}, None, UnsupportedError, r"recipe\.yaml: encoder is 'whisper'"),
    ({"dataset_conf": 5}, None, CheckpointError, r"recipe\.yaml: dataset_conf"),
    ({"vocab_size": "many"}, None, CheckpointError, r"recipe\.yaml: output_dim"),
    (None, None, CheckpointError, r"recipe\.yaml: is not a mapping"),
])  # fmt: skip
def test_what_is_refused(tmp_path, changes, vocab_size, error, message):
    file = recipe_of(tmp_path, **changes or {})
    if changes is None:
        file.write_text("[1]", encoding="utf-8")
    with pytest.raises(error, match=message):
        export_random(file, tmp_path / "bundle", vocab_size=vocab_size)
    assert not (tmp_path / "bundle").exists()


def test_options_that_do_not_go_together(tmp_path, capsys):
    file, out = str(recipe_of(tmp_path)), str(tmp_path / "out")
    assert cli.main(["export", file, out, "--seed", "1"]) == 1
    assert "--vocab-size and --seed require --random" in capsys.readouterr().err
    assert cli.main(["export", "--random", file, out, "--units", "units.txt"]) == 1
    assert "--random cannot be combined with --weights" in capsys.readouterr().err


EMULATOR = shutil.which("qemu-x86_64")
WRITE = f"""
import sys, torch, pathlib
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "toys")!r}]
import conftest, test_random_checkpoint
folder, num_threads = sys.argv[1:]
torch.set_num_threads(int(num_threads))
test_random_checkpoint.write(conftest.write_bundle, pathlib.Path(folder))
"""
QUANTIZE = "import sys; from u2moe.quantize import *; quantize_bundle(*sys.argv[1:], RECIPES['int8'])"


def write(write_bundle, folder):
    quantize_bundle(write_bundle(PUBLISHED, folder / "fp32"), folder / "int8", RECIPES["int8"])


def digests(folder):
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(*command, **environment):
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def here(export_quickly, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    write(export_quickly, folder)
    return folder


@pytest.mark.endurance
@pytest.mark.parametrize(("num_threads", "environment"), [
    pytest.param(1, {"ATEN_CPU_CAPABILITY": "default"}, id="plain code"),
    pytest.param(2, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, id="AVX2 and two threads"),
])  # fmt: skip
def test_bundles_are_equal_to_the_byte(here, tmp_path, num_threads, environment):
    run(sys.executable, "-c", WRITE, tmp_path, str(num_threads), **environment)
    assert digests(tmp_path) == digests(here)


def test_the_demo_is_what_its_checkpoint_gives(here):
    again, demo = Bundle.open(here / "int8"), Bundle.open(DEMO_FOLDER)
    assert again.manifest.model == demo.manifest.model
    assert again.tokens == demo.tokens
    features = np.random.default_rng(0).normal(10, 3, (300, 80)).astype(np.float32)
    np.testing.assert_array_equal(again.load().encode(features), demo.load().encode(features))
    for graph in demo.manifest.model.graphs():
        written, shipped = (ir.load(bundle.path / graph.file) for bundle in (again, demo))
        # native kernels replace these functions: an older form yields the same numbers with a smaller gain
        assert [node.op_type for node in written.graph] == [node.op_type for node in shipped.graph]
        found, expected = written.graph.initializers, shipped.graph.initializers
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name].const_value.numpy(), value.const_value.numpy(), err_msg=name)


@pytest.mark.endurance
@pytest.mark.skipif(EMULATOR is None, reason="needs Debian's qemu-user")
def test_an_emulated_processor_quantizes_to_the_same_bytes(here, tmp_path):
    run(EMULATOR, "-cpu", "Haswell-noTSX", sys.executable, "-c", QUANTIZE, here / "fp32", tmp_path / "int8")
    assert digests(tmp_path / "int8") == digests(here / "int8")
