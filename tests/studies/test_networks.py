"""The studies of networks' costs and of quantizers, on tiny networks and invented results."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from corpora import write_noise

from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, audio_seconds, one_round, streaming_round, utterance
from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.studies import edge, full_size, moe_layer, quantizers, quantizing_memory, same_weights
from u2moe.benchmarks.studies.moe_layer import BITS, Layers, Shape
from u2moe.benchmarks.studies.shared import random_models
from u2moe.benchmarks.studies.shared.random_models import FLOAT, make_bundle, touched
from u2moe.export.architecture import FeedForward
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import PRESETS
from u2moe.quantize import Goal
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.layers import calls, layer_of
from u2moe.runtime.model.native import choose_kernels

pytestmark = pytest.mark.slow


def test_every_second_block_has_experts_and_the_others_a_dense_layer(tmp_path, monkeypatch):
    monkeypatch.setitem(random_models.SIZES, edge.HALF, PRESETS["tiny"])
    monkeypatch.setattr(random_models, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    bundle = make_bundle(edge.HALF, "int4", tmp_path)
    found = {}
    for graph in bundle.manifest.model.graphs():
        for node in calls(ir.load(bundle.path / graph.file), "Int4FeedForward", "Int4MixtureOfExperts"):
            found.setdefault(layer_of(node).rsplit(".", 1)[0], set()).add(node.op_type.split("_")[0])
    assert list(found.values()) == [{"Int4FeedForward"}, {"Int4MixtureOfExperts"}] * 3, found


def test_what_exists_is_neither_made_nor_measured_again(tmp_path, monkeypatch):
    for place in (tmp_path / model / form for model in edge.TITLES for form in edge.FORMATS):
        place.mkdir(parents=True)
    starts = {cases[-1].key: {} for cases in edge.groups()}
    edge.record(tmp_path / edge.STATE, {"touched": dict.fromkeys(edge.TITLES, 1.0), "starts": starts})
    done = []
    monkeypatch.setattr(edge.Bundle, "open", lambda *_, **__: None)
    monkeypatch.setattr(edge, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(edge, "publish", lambda file, content, *_, **__: done.append(content["starts"]))
    edge.main([str(tmp_path)])
    assert done == [starts]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_bundle("tiny", FLOAT, tmp_path_factory.mktemp("models"))


def test_bundles_are_made_once_and_rounds_work_on_as_much_audio_as_they_say_as_a_stream_in_steady_state(tiny):
    root, made = tiny.path.parents[1], tiny.path.stat().st_mtime_ns
    bundle = make_bundle("tiny", "int8", root)
    assert bundle.manifest.quantization["recipe"] == "int8"
    assert make_bundle("tiny", FLOAT, root).path.stat().st_mtime_ns == made
    num_experts = bundle.manifest.architecture["encoder"]["feed_forward"]["num_experts"]
    assert num_experts >= touched(bundle) > 0.9 * num_experts
    model, frames = tiny.load(), utterance(tiny)
    expected = model.encode(frames, CHUNK_SIZE, 4)[5 * CHUNK_SIZE : 8 * CHUNK_SIZE]
    alone, again, together = (streaming_round(model.encoder, frames, streams, 3) for streams in (1, 1, 2))
    for run, tolerance in ((alone, 1e-5), (again, 1e-5), (together, 1e-4)):
        np.testing.assert_allclose(np.concatenate([output[0] for output in run()]), expected, atol=tolerance)
    np.testing.assert_array_equal(np.stack(alone()), np.stack(again()))  # the same chunks, at later positions
    for mode in ("streaming", "streaming-8"):
        log_probs = one_round(mode, model, frames)()
        assert sum(map(len, log_probs)) * tiny.manifest.frame_s == pytest.approx(audio_seconds(mode))
    assert len(one_round("full", model, frames)()) == 249
    left, right = one_round("second-pass", model, frames)()
    assert left.shape == right.shape == (10,)


@pytest.mark.endurance
@pytest.mark.filterwarnings("ignore:.*random weights, for measuring only")
@pytest.mark.parametrize("native", [False, True])
def test_a_machine_is_measured_with_native_kernels_and_without(native, tiny, tmp_path, monkeypatch, capsys):
    """With the tiny model in place of all models."""
    if native:
        pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)
    else:
        monkeypatch.setenv("U2MOE_KERNELS", "onnxruntime")
        monkeypatch.setattr(full_size, "choose_kernels", lambda _, providers: choose_kernels("onnxruntime", providers))
    monkeypatch.setattr(random_models, "SIZES", dict.fromkeys(random_models.MODELS, random_models.SIZES["tiny"]))
    rate = {"median": 1e9, "low": 1e9, "high": 1e9, "count": 1}
    products = {"operator": "x", "sizes": {"1 x 1 x 1": rate}, "best": "1 x 1 x 1"}
    multiply = {"integer": products, "float": products}
    rates = {"threads": 1, "multiply_adds_per_s": multiply, "read_bytes_per_s": {"640000000": rate}}
    own = {"ROUNDS": dict.fromkeys(full_size.ROUNDS, 1), "NUM_BOUNDS": 1, "NUM_STARTS": 1}
    for name, value in (own | {"measure_rates": lambda *_, **__: rates}).items():
        monkeypatch.setattr(full_size, name, value)
    for name in random_models.MODELS:
        (tmp_path / name).symlink_to(tiny.path.parent, target_is_directory=True)
    results = tmp_path / "full_size.json"
    results.write_text(json.dumps({"machines": {"another": {}}}))
    full_size.main([str(tmp_path), "--results", str(results)])
    machines = read_json(results)["machines"]
    assert machines.pop("another") == {}
    (own,) = machines.values()
    assert all(found["equal"] for found in own["threads"]["found"].values())
    shown = full_size.values({"machines": machines})
    assert shown["tables"].strip() == capsys.readouterr().out.strip()
    measured = {case.title for case in full_size.CASES if native or case.kernels == full_size.PLAIN}
    assert {case.title for case in full_size.CASES if case.title in shown["tables"]} == measured
    assert shown["threads.read"] == "1.00"
    targets = list(full_size.targets({"machines": machines}))
    assert len({target.name for target in targets}) == len(targets) == (11 + 2 + 1 if native else 1)


def test_layers_have_the_bytes_that_were_asked_for_and_everything_is_measured(tmp_path, monkeypatch, capsys):
    sizes = {"PAPER": Shape(4, 2, 64), "NARROW": (Shape(8, 2, 32),), "DIM": 32, "CALL_S": 0.001}
    for name, size in sizes.items():
        monkeypatch.setattr(moe_layer, name, size)
    for name, bits in BITS.items():
        own, random = Layers(name, 20_000, moe_layer.PAPER), np.random.default_rng(0)
        weights = 2 * 32 * 64 * bits / 8
        assert weights < own.bytes_per_expert < 2 * weights
        assert len(own.gates) * 4 * weights >= 20_000
        assert [own.touched(random.standard_normal((size, 32), np.float32)) for size in (1, 500)] == [2, 4]
    measure = moe_layer.measure
    monkeypatch.setattr(moe_layer, "measure", lambda tokens=(1, 16), **own: measure(tokens, 20_000, 1, **own))
    file = tmp_path / "moe_layer.json"
    file.write_text(json.dumps({"machines": {"another": {}}}))
    moe_layer.main(["--results", str(file), "--narrow"])
    narrow = read_json(file)["machines"]
    capsys.readouterr()
    moe_layer.main(["--results", str(file)])
    machines = read_json(file)["machines"]
    assert machines.pop("another") == {}
    (content,) = machines.values()
    found = [(item["recipe"], item["tokens"]) for item in content["layers"]]
    assert found == [(name, count) for name in BITS for count in (1, 16)]
    assert content["narrow"] in [own.get("narrow") for own in narrow.values()]  # kept
    found = [(item["recipe"], item["tokens"], item["shape"]) for item in content["narrow"]["layers"]]
    assert found == [(name, 16, shape) for name in ("int8", "int4-experts") for shape in ([4, 2, 64], [8, 2, 32])]
    assert all(item["least_s"] == max(item["read_s"], item["arithmetic_s"]) for item in content["layers"])
    assert capsys.readouterr().out.strip() == moe_layer.values({"machines": machines})["tables"]


@pytest.mark.endurance
def test_torch_as_used_by_wenet_computes_the_same(tmp_path, monkeypatch, study):
    monkeypatch.setattr(same_weights, "MIXTURE", "tiny")
    monkeypatch.setattr(same_weights, "measure", lambda root, own=same_weights.measure: own(root, "tiny"))
    bundle, own = same_weights.encoders(tmp_path, "tiny")
    frames = utterance(bundle)[:400]
    for mode in same_weights.MODES:
        runs = {key: same_weights.one_round(encoder, mode, frames, bundle) for key, encoder in own.items()}
        found = {key: np.concatenate([output[0] for output in run()]) for key, run in runs.items()}
        assert len(found["float32"]) >= 16
        # sums have a different order
        assert relative_error(found["float32"], found["torch"]) <= 1e-4
        # activations and weights are rounded, so a router near a tie may choose another expert
        assert 1e-4 < relative_error(found["float32"], found["int8"]) <= 0.06
    same_weights.main([str(tmp_path), "--prepare"])
    content = study(same_weights, tmp_path)
    assert content["modes"]["full"]["float32"]["error"] == 0
    assert same_weights.values(content)["int8.full"] == "1.00"
    assert len(list(same_weights.targets(content))) == 2


def test_the_loop_is_ours_to_rounding_even_with_experts_of_no_and_one_token():
    config = FeedForward(kind="moe", hidden=24, activation="swish", bias=True, num_experts=8, num_experts_per_token=2)
    layer = MixtureOfExperts(16, config)
    with torch.inference_mode():
        for num_tokens in (1, 2, 5, 64):
            x = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(num_tokens))
            torch.testing.assert_close(same_weights.LoopedExperts(layer)(x), layer(x), rtol=0, atol=1e-6)


def test_the_hard_network_computes_the_same_as_plain_operators_do(small_bundle, tmp_path):
    hard = quantizers.with_outliers(small_bundle, tmp_path / "hard")
    frames = np.random.default_rng(0).normal(size=(90, small_bundle.manifest.features.num_mel_bins)).astype(np.float32)
    files = [tmp_path / f"{name}.onnx" for name in quantizers.GRAPHS]
    for file in files:
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(small_bundle.path / file.name)), file)
    plain, sessions = quantizers.plain_model(small_bundle, files)
    models = (*(each.load(quantizers.SETTINGS) for each in (small_bundle, hard)), plain)
    expected, scaled, found = (model.ctc(model.encode(frames)) for model in models)
    np.testing.assert_array_equal(scaled, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert [len(session.feeds) for session in sessions] == [1, 1]


def test_limits_are_judged_on_two_lists(small_bundle, tmp_path, monkeypatch):
    """A limit that is met becomes a row of numbers; one that cannot be met becomes its error."""
    runs = {
        "size": (quantizers.PLAIN, "int8", Goal(max_bytes=1e9)),
        "none": (quantizers.PLAIN, "int4", Goal(max_bytes=1)),
        "of another": (quantizers.HARD, "int8", Goal(max_bytes=1e9)),
    }
    monkeypatch.setattr(quantizers, "LIMITS", runs)
    recordings = sorted(write_noise(tmp_path, 3, 16_000).glob("*.wav"))
    lists = {"chose": recordings, "kept back": recordings[:1]}
    found = dict(quantizers.limited(small_bundle, quantizers.PLAIN, lists, tmp_path))
    assert found["size"]["kept back"]["recordings"] == 1
    assert "at most 1e-06 MB" in found["none"]["failed"]
    content = {"networks": {"plain": {}, "hard": {}}, "limits": found, "recordings": 1, "calibrated": 1}
    shown = quantizers.values(content)["limits"]
    assert (shown.count(" to "), len(shown.splitlines())) == (2, 4)


def test_memory_is_that_of_a_process_of_its_own(small_bundle, monkeypatch, study):
    monkeypatch.setattr(quantizing_memory, "MODES", {"--no-report": ["--no-report"]})
    found = study(quantizing_memory, small_bundle.path, "none.tsv")
    assert found["bytes"] == sum(own.size for own in small_bundle.manifest.files.values())
    assert 5e7 < found["peaks"]["--no-report"] < 1e9
