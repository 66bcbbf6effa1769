import dataclasses
import json

import numpy as np
import pytest

from u2moe.benchmarks.full_size import cells as kinds
from u2moe.benchmarks.full_size import measure as full_size
from u2moe.benchmarks.full_size.cells import AS_ROUTED, Cell, all_cells, cell_of, encoder_ratio, ratio, spread
from u2moe.benchmarks.full_size.measure import run
from u2moe.benchmarks.full_size.models import make_artefact
from u2moe.benchmarks.full_size.networks import Networks
from u2moe.benchmarks.full_size.page import values
from u2moe.benchmarks.full_size.targets import targets
from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.instruments.workload import (
    CHUNK_SIZE,
    audio_seconds,
    one_round,
    random_frames,
    streaming_round,
    utterance,
)
from u2moe.runtime import Bundle

pytestmark = pytest.mark.slow

PARTS = ("streaming", "streaming-8", "full", "second-pass")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_artefact("tiny", tmp_path_factory.mktemp("artefacts"), parity=True)


@pytest.fixture(scope="session")
def tiny_model(tiny):
    return Bundle.open(tiny.bundle("fp32")).load()


@pytest.fixture
def results(tmp_path):
    return tmp_path / "full_size.json"


def test_artefacts_are_made_once_and_anew_when_asked(tiny):
    def made():
        return [(tiny.bundle(precision) / "encoder.onnx").stat().st_mtime_ns for precision in ("fp32", "int8")]

    assert tiny.ready
    assert Bundle.open(tiny.bundle("int8")).manifest.quantization["recipe"] == "int8"
    assert "agree in" in tiny.export["said"]
    assert tiny.export["cpu_s"] > 0
    assert 10e6 < tiny.export["peak_bytes"] < 4e9
    before = made()
    make_artefact("tiny", tiny.folder.parent)
    assert made() == before
    digests = Bundle.open(tiny.bundle("int8")).manifest.files
    make_artefact("tiny", tiny.folder.parent, again=True)
    assert all(new > old for new, old in zip(made(), before, strict=True))
    assert Bundle.open(tiny.bundle("int8")).manifest.files == digests  # seeded: the same to the last bit


def test_a_round_of_streaming_is_what_a_stream_computes_in_steady_state(tiny, tiny_model):
    frames = utterance(Bundle.open(tiny.bundle("fp32")))
    assert len(frames) == 1000
    expected = tiny_model.encode(frames, CHUNK_SIZE, 4)[5 * CHUNK_SIZE : 8 * CHUNK_SIZE]
    alone = streaming_round(tiny_model.encoder, frames, 1, 3)
    np.testing.assert_allclose(np.concatenate([output[0] for output in alone()]), expected, atol=1e-5)
    np.testing.assert_array_equal(np.stack(alone()), np.stack(alone()))  # every round begins at the same state
    together = streaming_round(tiny_model.encoder, frames, 2, 3)()
    np.testing.assert_allclose(np.concatenate([output[0] for output in together]), expected, atol=1e-4)
    other = tiny_model.encode(np.roll(frames, -100, axis=0), CHUNK_SIZE, 4)[5 * CHUNK_SIZE : 8 * CHUNK_SIZE]
    np.testing.assert_allclose(np.concatenate([output[1] for output in together]), other, atol=1e-4)


def test_rounds_work_on_as_much_audio_as_they_say(tiny, tiny_model):
    frames = utterance(Bundle.open(tiny.bundle("fp32")))
    for mode in ("streaming", "streaming-8"):
        log_probs = one_round(mode, tiny_model, frames)()
        frame_s = Bundle.open(tiny.bundle("fp32")).manifest.frame_s
        assert sum(map(len, log_probs)) * frame_s == pytest.approx(audio_seconds(mode))
    assert len(one_round("full", tiny_model, frames)()) == 249
    left, right = one_round("second-pass", tiny_model, frames)()
    assert left.shape == right.shape == (10,)


def test_other_frames_than_results_are_read_with_are_refused(tiny):
    bundle = Bundle.open(tiny.bundle("fp32"))
    features = dataclasses.replace(bundle.manifest.features, frame_shift_ms=12.5)
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, features=features), bundle.tokens)
    for frames in (utterance, random_frames):
        with pytest.raises(ValueError, match=r"its encoder frames last 0\.05 s, results are read as of 0\.04 s"):
            frames(other)


def test_measured_cells_survive_a_kill_and_are_not_measured_again(tiny, results, monkeypatch):
    cells = [Cell(precision="fp32", num_threads=1, mode=mode) for mode in PARTS]
    real, calls = full_size.measure, []

    def killed_at_the_third(cell, *rest):
        calls.append(cell)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(cell, *rest)

    monkeypatch.setattr(full_size, "measure", killed_at_the_third)
    options = {"models": ["tiny"], "cells": cells, "repetitions": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tiny.folder.parent, results, **options)
    before = json.loads(results.read_text())["cells"]
    assert list(before) == [cell.key for cell in cells[:2]]
    run(tiny.folder.parent, results, at_most=1, **options)
    after = json.loads(results.read_text())["cells"]
    assert list(after) == [cell.key for cell in cells[:3]]
    assert {key: after[key] for key in before} == before
    run(tiny.folder.parent, results, **options)
    assert calls == [*cells[:3], cells[2], cells[3]]
    assert all(len(cell["tiny"]["seconds"]) == 2 for cell in json.loads(results.read_text())["cells"].values())


def test_results_of_other_models_or_another_machine_are_refused(tiny, results):
    options = {"models": ["tiny"], "cells": [Cell(precision="fp32", num_threads=1, mode="full")], "repetitions": 1}
    content = run(tiny.folder.parent, results, **options)
    for change, message in (
        ({"parameters": {"tiny": 1}}, "holds .*, expected"),
        ({"machine": {"processor": "another"}}, "measured on another, this is"),
    ):
        results.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            run(tiny.folder.parent, results, **options)


def test_a_start_is_measured_in_fresh_processes(tiny, results):
    cell = Cell(precision="int8", num_threads=1, mode="start")
    content = run(tiny.folder.parent, results, models=["tiny"], cells=[cell], repetitions=1)
    found = content["cells"][cell.key]["tiny"]
    assert min(found[part]["median"] for part in ("verify_s", "load_s", "peak_bytes")) > 0
    size = sum(file.stat().st_size for file in tiny.bundle("int8").iterdir() if file.name != "bundle.json")
    assert found["disk"]["files"] == size


def test_the_bound_is_measured_part_by_part(tiny, results):
    cell = Cell(precision="int8", num_threads=1, mode="bound-full")
    content = run(tiny.folder.parent, results, models=["tiny"], cells=[cell], repetitions=1)
    entry = content["cells"][cell.key]["tiny"]
    assert entry["audio_s"] == 10
    assert set(entry["parts"]) >= {"subsampling", "feed_forward", "attention", "convolution"}
    least_s = sum(part["least_s"] for name, part in entry["parts"].items() if name not in ("ctc", "decoder"))
    assert least_s > 0
    assert encoder_ratio(entry).median == pytest.approx(entry["stages"]["encoder"]["median"] / least_s)
    seconds = sum(part["seconds"] for name, part in entry["parts"].items() if name not in ("ctc", "decoder"))
    assert entry["stages"]["encoder"]["median"] == pytest.approx(seconds)


def test_models_are_loaded_once_for_cells_that_follow_each_other(tiny, results, monkeypatch):
    full_size.prepare(tiny.folder.parent, ["tiny"])
    loads, load = [], Bundle.load
    monkeypatch.setattr(Bundle, "load", lambda *args, **options: loads.append(args) or load(*args, **options))
    cells = [Cell(precision="int8", num_threads=1, mode=mode) for mode in PARTS]
    content = run(tiny.folder.parent, results, models=["tiny"], cells=cells, repetitions=1)
    assert len(loads) == 2  # evenly routed, and as the demo model
    assert all(content["cells"][cell.key].keys() == {"tiny", "tiny/routed"} for cell in cells[:-1])
    assert content["cells"]["int8/1/second-pass"].keys() == {"tiny"}


def test_another_demo_model_is_looked_at(tiny, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(tiny.folder)
    monkeypatch.setattr(Networks, "routings", lambda networks: {kinds.DEMO: networks.demo})

    def known(bundle, touched):
        monkeypatch.setattr(full_size, "of_bundle", lambda _: {"bundle": bundle})
        monkeypatch.setattr(full_size, "demo_routing", lambda: {"touched": touched, "bundle": bundle})
        return full_size.prepare(tmp_path, ["tiny"])[1][kinds.DEMO]["touched"]

    assert known("a", 3.0) == 3.0
    assert known("a", 5.0) == 3.0
    assert known("b", 5.0) == 5.0


def test_what_depends_on_the_demo_model_is_measured_again_with_another(tiny, results, monkeypatch):
    networks = Networks([tiny], {})
    cells = [Cell(precision=name, num_threads=1, mode="full") for name in ("fp32", "int8")]
    cases = {"fp32": {"tiny": {}}, "int8": {"tiny": {}, f"tiny/{kinds.ROUTED}": {}}}
    measured = []

    def with_demo(bundle):
        measured.clear()
        monkeypatch.setattr(full_size, "of_bundle", lambda _: {"bundle": bundle})
        found = (networks, {kinds.DEMO: {"bundle": bundle}})
        monkeypatch.setattr(full_size, "prepare", lambda *_, **__: found)
        run(tiny.folder.parent, results, models=["tiny"], cells=cells)
        return list(measured)

    monkeypatch.setattr(full_size, "measure", lambda cell, *_: measured.append(cell.precision) or cases[cell.precision])
    assert with_demo("a") == ["fp32", "int8"]
    assert with_demo("a") == []
    assert with_demo("b") == ["int8"]


def made_up(streaming=(1.0, 2.0, 1.5, 3.0)):
    """Results of all cells: Dense-225M takes 0.1 s for each second of audio, MoE-1B twice that, and so on."""
    models = (kinds.SMALL, kinds.MIXTURE, AS_ROUTED, kinds.LARGE)
    part = {"seconds": 0.6, "least_s": 0.5, "read_s": 0.25, "arithmetic_s": 0.5, "ratio": 1.2}
    parts = {"feed_forward": part, "attention": {**part, "seconds": 1.2, "ratio": 2.4}, "ctc": part, "other": part}
    rates = {"integer": 100e9, "float": 50e9, "read": 20e9}
    encoder = Spread(median=2.4, low=2.1, high=3.0, count=3).data()
    cells = {}
    for cell in all_cells():
        if cell.mode == "start":
            values = {"verify_s": 1, "load_s": 1.5, "start_s": 2.5, "loaded_bytes": 1.4e9, "peak_bytes": 1.4e9}
            start: dict = {name: Spread.of([value]).data() for name, value in values.items()}
            start |= {"disk": {"files": 1e9}}
            cells[cell.key] = dict.fromkeys(kinds.MODELS, start)
        elif cell.mode in kinds.BOUNDS:
            entry = {"parts": parts, "rates": rates, "audio_s": 10.0, "stages": {"encoder": encoder}}
            cells[cell.key] = dict.fromkeys((kinds.SMALL, kinds.MIXTURE), entry)
        else:
            factors = streaming if cell.mode == "streaming" else (1.0, 1.5, 1.25, 4.5)
            size = 0.1 if cell.mode == "second-pass" else 0.1 * audio_seconds(cell.mode)
            cells[cell.key] = {
                name: {"seconds": [size * factor * noise for noise in (1, 9, 0.9)]}
                for name, factor in zip(models, factors, strict=True)
            }
    routings = {
        title: {"num_experts": 8, "touched": touched, "load_entropy": touched / 10}
        for title, touched in zip(ROUTINGS, (4.0, 5.0, 7.9, 4.0), strict=True)
    }
    parameters = dict.fromkeys(kinds.MODELS, 1_500_000_000)
    exports = {kinds.MIXTURE: {"cpu_s": 100, "peak_bytes": 9.06e9, "said": "both agree."}}
    found = {"routings": routings, "exports": exports, "cells": cells}
    return {"parameters": parameters, **found}


ROUTINGS = (kinds.DEMO, kinds.OWN, kinds.EVEN, kinds.AS_DEMO)


def test_ratios_are_of_rounds_and_factors_of_audio():
    results = made_up()
    assert spread(cell_of(results, "streaming-8"), "streaming-8", "dense-225m").median == pytest.approx(0.1)
    assert spread(cell_of(results, "second-pass"), "second-pass", "moe-1b").median == pytest.approx(0.15)
    cell = {"moe-1b": {"seconds": [2.0, 30.0, 4.0]}, "dense-1b": {"seconds": [1.0, 10.0, 1.0]}}
    assert ratio(cell, "moe-1b", "dense-1b").median == 3  # of medians it would be 4


def test_targets_say_what_was_met():
    found = {item.name: item for item in targets(made_up())}
    measured = {name: item.value for name, item in found.items()}
    even = found["RTF of MoE-1B / Dense-225M, streaming, even routing"]
    assert even.met
    assert even.value == pytest.approx(2)
    assert measured["RTF of MoE-1B / Dense-225M, streaming, routed as the demo model"] == pytest.approx(1.5)
    assert measured["RTF of MoE-1B / Dense-225M, full context, even routing"] == pytest.approx(1.5)
    assert measured["RTF of Dense-1B / MoE-1B, full context"] == pytest.approx(3)
    encoder = found["encoder of MoE-1B / its bound, streaming"]
    assert encoder.value == pytest.approx(2.4 / 1.5)
    assert encoder.found.low == pytest.approx(2.1 / 1.5)
    assert measured["second pass of MoE-1B, 10 s, 10 hypotheses"] == pytest.approx(150)
    throughput = found["throughput of 8 streams of MoE-1B in a batch / one"]
    assert throughput.value == pytest.approx(2 / 1.5)
    assert not throughput.met
    assert measured["MoE-1B: check and load"] == 2.5
    assert "MoE-1B: peak memory" in measured
    assert found["MoE-1B: peak memory"].limit == 1450
    slow = {item.name: item for item in targets(made_up((1, 2.2, 1.5, 3)))}
    assert not slow["RTF of MoE-1B / Dense-225M, streaming, even routing"].met
    assert targets({**made_up(), "cells": {}}) == []


def test_the_page_has_the_numbers_of_its_prose():
    found = values(made_up())
    # 0.25 s for 10 s of audio at 5 experts: 25.28 ms a chunk at 7.9
    assert [found[name] for name in ("read_ms", "chunk_ms", "read_rate", "read_share")] == ["25", "128", "20", "0.40"]
    assert [found[name] for name in ("in_turn", "above.feed_forward", "touched.even")] == ["1.50", "0.07", "7.9"]
    assert [found[name] for name in ("export_s", "export_gb", "export_parity")] == ["100", "9.1", "both agree."]
    assert [found[name] for name in ("full.even", "full.dense_1b", "streaming.as_demo")] == ["1.50", "3.00", "1.50"]


def test_the_page_compares_the_arithmetic_of_full_context():
    results = made_up()
    cell = cell_of(results, "bound-full")
    parts = {
        name: {**part, "arithmetic_s": 1.4 * part["arithmetic_s"]} for name, part in cell["moe-1b"]["parts"].items()
    }
    more = {**cell["moe-1b"], "parts": parts}
    found = values({**results, "cells": {**results["cells"], "int8/1/bound-full": {**cell, "moe-1b": more}}})
    assert found["arithmetic"] == "1.40"


def test_the_tables_show_every_cell():
    found = values(made_up((1.0, 2.5, 1.5, 3.0)))
    text = "\n".join(found[name] for name in ("table", "bounds", "starts"))
    for title in ("streaming", "streaming, batch of 8", "full context", "second pass"):
        for precision in ("int8", "fp32"):
            assert text.count(f"| {precision}, {title} | 1 |") == text.count(f"| {precision}, {title} | 2 |") == 1
    assert "| int8, streaming | 1 | 0.1000 (0.0950-0.5000) | 0.2500 (0.2375-1.2500) | 0.1500" in text
    assert "| 2.50 (2.50-2.50) | 1.50 (1.50-1.50) | 0.83 (0.83-0.83) |" in text
    assert "| MoE-1B, int8 | 1000 | 1.00 (1.00-1.00) | 1.50 (1.50-1.50) | 1400 (1400-1400) | 1400 (1400-1400) |" in text
    assert "| attention | 76.8, 2.40 | 76.8, 2.40 | 1200, 2.40 |" in text  # a chunk of 0.64 s, and all 10 s
    assert "| whole | 153.6 (134.4-192.0), 1.60 | 153.6 (134.4-192.0), 1.60 | 2400.0 (2100.0-3000.0), 1.60 |" in text
    assert "| rates | 100 / 50 / 20 | 100 / 50 / 20 |" in text


def test_a_table_of_few_cells_leaves_out_what_was_not_measured():
    results = made_up()
    del results["cells"]["int8/1/streaming"][AS_ROUTED]  # of int8 on one thread alone
    kept = {"int8/1/streaming": results["cells"]["int8/1/streaming"]}
    found = values({**results, "cells": kept, "routings": {}})
    text = found["table"]
    row = next(line for line in text.splitlines() if line.startswith("| int8, streaming"))
    assert row.count("|") == text.splitlines()[text.splitlines().index(row) - 1].count("|")
    assert "| 2.00 (2.00-2.00) |  | 0.67 (0.67-0.67) |" in row
    assert len(found["starts"].splitlines()) == 2
    assert "read_ms" not in found
