"""The full-size studies, on a tiny model with experts."""

import dataclasses
import json

import numpy as np
import pytest

from u2moe.benchmarks.bench.expert_usage import measure_experts
from u2moe.benchmarks.instruments.probe import Mode
from u2moe.benchmarks.instruments.workload import (
    CHUNK_SIZE,
    audio_seconds,
    one_round,
    random_frames,
    streaming_round,
    utterance,
)
from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.studies import full_size, native
from u2moe.benchmarks.studies.shared import encoders, random_models
from u2moe.benchmarks.studies.shared.random_models import FLOAT, GateSettings, even_gates, make_bundle, routing
from u2moe.runtime import Bundle, SessionSettings

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


def test_bundles_are_made_once(tiny, root):
    made = tiny.path.stat().st_mtime_ns
    assert make_bundle("tiny", "int8", root).manifest.quantization["recipe"] == "int8"
    assert make_bundle("tiny", FLOAT, root).path.stat().st_mtime_ns == made


def test_a_round_of_streaming_is_what_a_stream_computes_in_steady_state(tiny, model):
    frames = utterance(tiny)
    expected = model.encode(frames, CHUNK_SIZE, 4)[5 * CHUNK_SIZE : 8 * CHUNK_SIZE]
    alone = streaming_round(model.encoder, frames, 1, 3)
    np.testing.assert_allclose(np.concatenate([output[0] for output in alone()]), expected, atol=1e-5)
    np.testing.assert_array_equal(np.stack(alone()), np.stack(alone()))  # every round begins at the same state
    together = streaming_round(model.encoder, frames, 2, 3)()
    np.testing.assert_allclose(np.concatenate([output[0] for output in together]), expected, atol=1e-4)


def test_rounds_work_on_as_much_audio_as_they_say(tiny, model):
    frames = utterance(tiny)
    for mode in ("streaming", "streaming-8"):
        log_probs = one_round(mode, model, frames)()
        assert sum(map(len, log_probs)) * tiny.manifest.frame_s == pytest.approx(audio_seconds(mode))
    assert len(one_round("full", model, frames)()) == 249
    left, right = one_round("second-pass", model, frames)()
    assert left.shape == right.shape == (10,)


def test_other_frames_than_results_are_read_with_are_refused(tiny):
    features = dataclasses.replace(tiny.manifest.features, frame_shift_ms=12.5)
    other = Bundle(tiny.path, dataclasses.replace(tiny.manifest, features=features), tiny.tokens)
    for frames in (utterance, random_frames):
        with pytest.raises(ValueError, match=r"its encoder frames last 0\.05 s, results are read as of 0\.04 s"):
            frames(other)


def test_adjusted_routers_spread_tokens_evenly(root):
    bundle = make_bundle("tiny", "int8", root)
    frames, gates = random_frames(bundle), even_gates("tiny", root)
    own, even = routing(bundle, frames, {}), routing(bundle, frames, gates)
    assert even["load_entropy"] > max(own["load_entropy"], 0.98)
    assert even["touched"] > max(own["touched"], 0.9 * even["num_experts"])
    settings = GateSettings(gates)  # must outlive the session
    output = bundle.load(SessionSettings(sess_options=settings.options())).encode(frames)
    assert not np.allclose(output, bundle.load().encode(frames))  # sessions use them


def test_experts_of_a_bundle_are_those_of_its_own_routers(root):
    bundle = make_bundle("tiny", "int8", root)
    samples = np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    (found,) = measure_experts(bundle, [samples], [Mode(chunk_size=16, num_left_chunks=4)]).values()
    assert 2 <= found["touched"]["mean"] <= found["num_experts"]


CELLS = ["int8/1/start", "fp32/1/streaming", "int8/1/second-pass", "int8/1/bound-full"]


def test_cells_are_measured_once(root, tmp_path, monkeypatch):
    results = tmp_path / "full_size.json"
    options = {"models": ["tiny"], "repetitions": 1}
    content = full_size.run(root, results, CELLS, **options)
    assert list(content["cells"]) == CELLS
    assert content["cells"]["int8/1/start"]["tiny"]["verify_s"]["median"] > 0
    assert len(content["cells"]["fp32/1/streaming"]["tiny"]["seconds"]) == 1
    entry = content["cells"]["int8/1/bound-full"]["tiny"]
    assert encoders.bound_ratio(entry).median > 0
    assert set(encoders.parts_of(entry)) >= {"subsampling", "feed_forward", "attention", "convolution"}
    assert {*content["routings"]} == {full_size.OWN, full_size.EVEN}
    monkeypatch.setattr(full_size, "measure", lambda *_: pytest.fail("was measured"))
    assert full_size.run(root, results, CELLS, **options) == content
    results.write_text(json.dumps({**content, "parameters": {"tiny": 1}}))
    with pytest.raises(ValueError, match=r"holds .*, expected"):
        full_size.run(root, results, CELLS, **options)


def test_ratios_are_of_rounds_and_factors_of_audio():
    cell = {"moe-1b": {"seconds": [2.0, 30.0, 4.0]}, "dense-1b": {"seconds": [1.0, 10.0, 1.0]}}
    assert full_size.ratio(cell, "moe-1b", "dense-1b").median == 3  # of medians it would be 4
    assert full_size.spread(cell, "full", "moe-1b").median == pytest.approx(0.4)
    assert full_size.spread(cell, "second-pass", "moe-1b").median == 4


@pytest.mark.endurance
def test_native_kernels_beside_none(root, tmp_path, monkeypatch, capsys):
    """With the tiny model in the place of both."""
    pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)
    monkeypatch.setattr(random_models, "PRESETS", dict.fromkeys(random_models.MODELS, random_models.PRESETS["tiny"]))
    monkeypatch.setattr(native, "ROUNDS", dict.fromkeys(native.ROUNDS, 1))
    for name in ("NUM_BOUNDS", "NUM_STARTS"):
        monkeypatch.setattr(native, name, 1)
    rate = {"median": 1e9, "low": 1e9, "high": 1e9, "count": 1}
    products = {"operator": "x", "sizes": {"1 x 1 x 1": rate}, "best": "1 x 1 x 1"}
    rates = {"multiply_adds_per_s": {"integer": products, "float": products}, "read_bytes_per_s": {"640000000": rate}}
    monkeypatch.setattr(native, "measure_rates", lambda *_, **__: rates)
    for name in (native.MIXTURE, native.SMALL):
        (tmp_path / name).symlink_to(root / "tiny", target_is_directory=True)
    results = tmp_path / "native.json"
    results.write_text(json.dumps({"machines": {"another": {}}}))
    native.main([str(tmp_path), "--results", str(results)])
    machines = read_json(results)["machines"]
    assert machines.pop("another") == {}
    ((_, own),) = machines.items()
    assert own["threads"]["found"][native.INT8.key]["equal"]
    shown = native.values({"machines": machines})
    assert shown["tables"] in capsys.readouterr().out
    assert all(case.title in shown["tables"] for case in native.CASES)
    assert shown["threads.read"] == "1.00"
    targets = list(native.targets({"machines": machines}))
    assert len({target.name for target in targets}) == len(targets) == 11 + 2 + 1 + 6
