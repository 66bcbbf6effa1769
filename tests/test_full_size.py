import json

import numpy as np
import pytest

from u2moe.benchmarks import full_size
from u2moe.benchmarks.artefacts import make_artefact
from u2moe.benchmarks.full_size import Cell, all_cells, run
from u2moe.benchmarks.full_size_table import TITLES, ratio, spread, table, targets
from u2moe.benchmarks.utterances import CHUNK_SIZE, audio_seconds, one_round, streaming_round, utterance
from u2moe.runtime import Bundle

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
    assert not (tiny.folder / "checkpoint").exists()
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
        assert sum(map(len, log_probs)) * 0.04 == pytest.approx(audio_seconds(mode))
    assert len(one_round("full", tiny_model, frames)()) == 249
    left, right = one_round("second-pass", tiny_model, frames)()
    assert left.shape == right.shape == (10,)


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
    touched = {title: modes["chunk 16, left 4"]["touched"] for title, modes in content["experts"].items()}
    assert set(touched) == {"tiny", "demo model"}
    assert all(2 <= number <= 8 for number in touched.values())


def made_up(streaming=(1.0, 2.0, 3.0)):
    """Results of all cells: Dense-225M takes 0.1 s for each round of audio seconds, MoE-1B twice that, and so on."""
    cells = {}
    for cell in all_cells():
        if cell.mode == "start":
            start = {name: {"median": value} for name, value in (("verify_s", 1), ("load_s", 1.5))}
            start |= {f"{name}_bytes": {"median": 1.4e9} for name in ("loaded", "peak")}
            start |= {"disk": {"files": 1e9}}
            cells[cell.key] = dict.fromkeys(full_size.MODELS, start)
        else:
            factors = streaming if cell.mode == "streaming" else (1.0, 1.5, 4.5)
            size = 0.1 if cell.mode == "second-pass" else 0.1 * audio_seconds(cell.mode)
            cells[cell.key] = {
                name: {"seconds": [size * factor * noise for noise in (1, 9, 0.9)]}
                for name, factor in zip(full_size.MODELS, factors, strict=True)
            }
    machine = {"processor": "a processor", "onnxruntime": "1.2.3", "commit": "abc"}
    routing = {"chunk 16, left 4": {"num_experts": 8, "touched": 7.94, "load_entropy": 0.987}}
    parameters = dict.fromkeys(full_size.MODELS, 1_500_000_000)
    return {"parameters": parameters, "machine": machine, "experts": {"MoE-1B": routing}, "cells": cells}


def test_ratios_are_of_rounds_and_factors_of_audio():
    cell = Cell(precision="int8", num_threads=1, mode="streaming-8")
    results = made_up()
    assert spread(results, cell, "dense-225m").median == pytest.approx(0.1)
    results["cells"][cell.key] = {
        "moe-1b": {"seconds": [2.0, 30.0, 4.0]},
        "dense-1b": {"seconds": [1.0, 10.0, 1.0]},
    }
    assert ratio(results, cell, "moe-1b", "dense-1b") == 3  # of medians it would be 4
    second_pass = Cell(precision="int8", num_threads=1, mode="second-pass")
    assert spread(results, second_pass, "moe-1b").median == pytest.approx(0.15)


def test_targets_say_what_was_met():
    found = {item.name: item for item in targets(made_up())}
    assert found["RTF of MoE-1B / Dense-225M, streaming"].met
    assert found["RTF of MoE-1B / Dense-225M, streaming"].found == pytest.approx(2)
    assert found["RTF of MoE-1B / Dense-225M, full context"].found == pytest.approx(1.5)
    assert found["MoE-1B faster than Dense-1B, full context"].found == pytest.approx(3)
    assert found["second pass of MoE-1B"].found == pytest.approx(150)
    throughput = found["throughput of 8 streams of MoE-1B in a batch / one at a time"]
    assert throughput.found == pytest.approx(2 / 1.5)
    assert not throughput.met
    assert found["MoE-1B: to check and load"].found == 2.5
    assert found["MoE-1B: peak memory"].limit == 1450
    assert not {item.name: item for item in targets(made_up((1, 2.2, 3)))}["RTF of MoE-1B / Dense-225M, streaming"].met
    none = targets({**made_up(), "cells": {}})
    assert none == []


def test_the_table_shows_every_cell_and_verdict():
    text = table(made_up((1.0, 2.5, 3.0)))
    for title in TITLES.values():
        for precision in ("int8", "fp32"):
            assert text.count(f"| {precision}, {title} | 1 |") == text.count(f"| {precision}, {title} | 2 |") == 1
    assert "| int8, streaming | 1 | 0.1000 (0.0950-0.5000) | 0.2500 (0.2375-1.2500) | 0.3000" in text
    assert "| 2.50 | 0.83 |" in text
    assert "| RTF of MoE-1B / Dense-225M, streaming | 2.5 | ≤ 2.1 | **not met** |" in text
    assert "| second pass of MoE-1B | 150 ms | ≤ 200 ms | met |" in text
    assert "| MoE-1B, int8 | 1000 MB | 1.00 s | 1.50 s | 1400 MB | 1400 MB |" in text
    assert "people's speech touches 7.9 in MoE-1B (entropy of the load 0.99 of 1)" in text
    assert "layer sizes are ours" in text
    assert "worst case" in text
