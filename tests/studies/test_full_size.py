"""The full-size studies, on a tiny model with experts."""

import json

import numpy as np
import pytest

from u2moe.benchmarks.instruments.workload import (
    CHUNK_SIZE,
    audio_seconds,
    one_round,
    streaming_round,
    utterance,
)
from u2moe.benchmarks.results.files import measured_here, read_json
from u2moe.benchmarks.studies import full_size
from u2moe.benchmarks.studies.shared import random_models
from u2moe.benchmarks.studies.shared.random_models import FLOAT, make_bundle, touched
from u2moe.runtime.model.native import choose_kernels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(root):
    return make_bundle("tiny", FLOAT, root)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.load()


def test_bundles_are_made_once_and_a_chunk_uses_nearly_all_experts(tiny, root):
    made = tiny.path.stat().st_mtime_ns
    assert make_bundle("tiny", "int8", root).manifest.quantization["recipe"] == "int8"
    assert make_bundle("tiny", FLOAT, root).path.stat().st_mtime_ns == made
    bundle = make_bundle("tiny", "int8", root)
    num_experts = bundle.manifest.architecture["encoder"]["feed_forward"]["num_experts"]
    assert num_experts >= touched(bundle) > 0.9 * num_experts


def test_rounds_work_on_as_much_audio_as_they_say_as_a_stream_in_steady_state(tiny, model):
    frames = utterance(tiny)
    expected = model.encode(frames, CHUNK_SIZE, 4)[5 * CHUNK_SIZE : 8 * CHUNK_SIZE]
    alone, again = (streaming_round(model.encoder, frames, 1, 3) for _ in range(2))
    for run in (alone, again):
        np.testing.assert_allclose(np.concatenate([output[0] for output in run()]), expected, atol=1e-5)
    np.testing.assert_array_equal(np.stack(alone()), np.stack(again()))  # the same chunks, at later positions
    together = streaming_round(model.encoder, frames, 2, 3)()
    np.testing.assert_allclose(np.concatenate([output[0] for output in together]), expected, atol=1e-4)
    frames = utterance(tiny)
    for mode in ("streaming", "streaming-8"):
        log_probs = one_round(mode, model, frames)()
        assert sum(map(len, log_probs)) * tiny.manifest.frame_s == pytest.approx(audio_seconds(mode))
    assert len(one_round("full", model, frames)()) == 249
    left, right = one_round("second-pass", model, frames)()
    assert left.shape == right.shape == (10,)


def test_ratios_are_of_rounds_and_factors_of_audio_and_bounds_of_what_is_measured():
    case, other = full_size.PLAIN_INT8, full_size.PLAIN_LARGE
    rounds = {case.key: [2.0, 30.0, 4.0], other.key: [1.0, 10.0, 1.0]}
    content = {"seconds": {"full": rounds, "second-pass": rounds}}
    assert full_size.ratio(content, "full", case, other).median == 3  # the ratio of medians would be 4
    assert full_size.factor(content, "full", case).median == pytest.approx(0.4)
    assert full_size.factor(content, "second-pass", case).median == 4
    assert full_size.factor(content, "streaming", case) is full_size.ratio(content, "streaming", case, other) is None
    seconds = {full_size.PLAIN_DENSE.key: [1.0], full_size.INT8.key: [1.2], full_size.PLAIN_INT8.key: [1.5]}
    bounds = {"full": {full_size.INT8.key: {"ms": {"median": 48.0}, "ratio": {"median": 1.2}}}}  # 40 ms at the bound
    batch = {full_size.PLAIN_DENSE.key: [0.05 * audio_seconds("streaming-8")]}
    content = {"seconds": {"full": seconds, "streaming-8": batch}, "bounds": bounds, "touched": 8.0, "starts": {}}
    shown = full_size.values({"machines": {"made up": {**measured_here(), "kernels": {"isa": "x"}} | content}})
    assert (shown["int8.full"], shown["bound.int8.full"], shown["bound.gain.full"]) == ("1.20", "1.00", "1.50")
    assert shown["bound.int4.batch"] == "0.80"


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
    monkeypatch.setattr(full_size, "ROUNDS", dict.fromkeys(full_size.ROUNDS, 1))
    for name in ("NUM_BOUNDS", "NUM_STARTS"):
        monkeypatch.setattr(full_size, name, 1)
    rate = {"median": 1e9, "low": 1e9, "high": 1e9, "count": 1}
    products = {"operator": "x", "sizes": {"1 x 1 x 1": rate}, "best": "1 x 1 x 1"}
    multiply = {"integer": products, "float": products}
    rates = {"threads": 1, "multiply_adds_per_s": multiply, "read_bytes_per_s": {"640000000": rate}}
    monkeypatch.setattr(full_size, "measure_rates", lambda *_, **__: rates)
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
