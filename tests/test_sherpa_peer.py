import json

import pytest

from u2moe.benchmarks.peers import sherpa as sherpa_peer
from u2moe.benchmarks.studies.sherpa import (
    DEMO,
    OURS,
    THEIRS,
    Cell,
    all_cells,
    bundle_of,
    graphs_of,
    main,
    measure,
    ratio,
    recording,
    run,
    sherpa_versions,
    targets,
    values,
)
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.windows import Windows

pytestmark = pytest.mark.slow

TINY = Cell(model="tiny", mode="streaming")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sherpa_peer")


@pytest.fixture(scope="module")
def tiny(root):
    bundle = bundle_of(TINY, root)
    return bundle, graphs_of(TINY, bundle, root)


def made_up(ours, theirs, *, audio_s=2.0):
    """A cell as it stands in the results."""
    runtimes = {OURS: ours, THEIRS: theirs}
    content = {"audio_s": audio_s, "letters": 50, "different_letters": 3}
    return content | {
        name: {"seconds": seconds, "cpu_s": seconds, "peak_mb": 100.4, "load_s": [0.123, 0.1, 0.2]}
        for name, seconds in runtimes.items()
    }


def test_cells_are_those_of_the_target_and_of_the_demo_model():
    assert [cell.key for cell in all_cells()] == [
        "dense-225m/streaming", "dense-225m/full", "demo/streaming", "demo/full",
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["tiny", DEMO])
def test_the_recording_fills_whole_chunks_and_no_more(model, root):
    manifest = bundle_of(Cell(model=model, mode="full"), root).manifest
    samples = recording(manifest)
    windows = Windows(manifest.model, 16)
    windows.accept(fbank(samples, manifest.features))
    num_chunks = 0
    while windows.take() is not None:
        num_chunks += 1
    chunk_s = 0.16 * manifest.model.subsampling_rate
    assert 10 - chunk_s < len(samples) / 16000 <= 10
    assert num_chunks == int(10 / chunk_s)
    # one frame less would be a chunk less
    windows = Windows(manifest.model, 16)
    windows.accept(fbank(samples[:-1], manifest.features))
    assert sum(windows.take() is not None for _ in range(num_chunks)) == num_chunks - 1
    assert len(recording(manifest, 5)) < 5 * 16000


@pytest.mark.parametrize("mode", ["streaming", "full"])
def test_both_runtimes_recognise_the_recording(mode, root):
    cell = Cell(model=DEMO, mode=mode)
    bundle = bundle_of(cell, root)
    found = measure(cell, bundle, graphs_of(cell, bundle, root), repetitions=2)
    assert found["audio_s"] == pytest.approx(9.665)  # in whole chunks
    assert found["letters"] > 50
    assert found["different_letters"] <= found["letters"] / 4  # features differ at the edges
    for name in (OURS, THEIRS):
        assert len(found[name]["seconds"]) == 2
        assert min(found[name]["seconds"]) > 0
        assert 30 < found[name]["peak_mb"] < 2000
        assert len(found[name]["load_s"]) == 3
        assert min(found[name]["load_s"]) > 0


def test_graphs_are_made_again_after_their_bundle(tiny, root):
    bundle, graphs = tiny

    def age():
        return (graphs / "model.onnx").stat().st_mtime_ns

    before = age()
    assert graphs_of(TINY, bundle, root) == graphs
    assert age() == before
    (bundle.path / "bundle.json").touch()
    assert graphs_of(TINY, bundle, root) == graphs
    assert age() > before


def test_results_keep_cells_that_are_not_measured_again(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sherpa_peer, "measure", lambda cell, *_: made_up([1.0], [2.0]))
    monkeypatch.setattr(sherpa_peer, "graphs_of", lambda *_: None)
    results = tmp_path / "sherpa_peer.json"
    results.write_text(json.dumps({"cells": {TINY.key: made_up([9.0], [9.0]), "a/full": made_up([3.0], [2.0])}}))
    content = run(root, results, cells=[TINY])
    assert content == json.loads(results.read_text())
    assert ratio(content["cells"][TINY.key]).median == 0.5
    assert ratio(content["cells"]["a/full"]).median == 1.5
    assert content["machine"]["processor"]
    assert content["commits"] == [content["machine"]["commit"]]


def test_the_ratio_is_that_of_rounds_in_which_both_took_turns():
    assert ratio(made_up([1.0, 20.0, 3.0], [1.0, 10.0, 2.0])).median == 1.5


def test_table_shows_both_and_judges_at_full_size_alone():
    cells = {
        "dense-225m/streaming": made_up([1.0, 1.1, 1.2], [1.0, 1.0, 1.0]),
        "dense-225m/full": made_up([1.0], [1.0]),
        "demo/full": made_up([2.0], [1.0]),
    }
    results = {"cells": cells, "sherpa_onnx": {"onnxruntime": "1.28.2"}}
    found = values(results)
    text = found["table"]
    assert (found["onnxruntime"], found["dense-225m.streaming"], found["demo.full"]) == ("1.28.2", "1.10", "2.00")
    assert (
        "| dense-225m, streaming | 0.5500 (0.5250-0.5750) | 0.5000 (0.5000-0.5000) | 1.100 (1.050-1.150) "
        "| 100 / 100 | 0.12 (0.11-0.16) / 0.12 (0.11-0.16) | 3 of 50 |" in text.splitlines()
    )
    assert "| demo, full | 1.0000 (1.0000-1.0000) | 0.5000 (0.5000-0.5000) | 2.000 (2.000-2.000) |" in text
    assert [target.met for target in targets(results)] == [False, True]


def test_the_wheel_tells_its_onnxruntime():
    assert sherpa_versions()["onnxruntime"].startswith("1.")


def test_command_makes_and_measures_nothing_else(tmp_path, capsys):
    results = tmp_path / "results.json"
    main([str(tmp_path), "--results", str(results), "--only", "demo/full", "--make"])
    assert "demo: graphs for sherpa-onnx" in capsys.readouterr().err
    assert (tmp_path / "demo" / "sherpa" / "model.onnx").exists()
    assert not results.exists()
