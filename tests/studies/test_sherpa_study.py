"""The study of sherpa-onnx: both runtimes on the demo model."""

import pytest

from u2moe.benchmarks.studies import sherpa
from u2moe.benchmarks.studies.sherpa import OURS, THEIRS, prepare, ratio, recording, targets, values
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.windows import Windows

pytestmark = pytest.mark.slow


def test_the_recording_fills_whole_chunks_and_no_more(bundle):
    manifest = bundle.manifest
    samples = recording(manifest)

    def num_chunks(samples):
        windows = Windows(manifest.model, 16)
        windows.accept(fbank(samples, manifest.features))
        count = 0
        while windows.take() is not None:
            count += 1
        return count

    assert num_chunks(samples) == num_chunks(samples[:-1]) + 1
    assert len(samples) <= 10 * manifest.features.sample_rate


@pytest.mark.parametrize("cell", ["demo/streaming", pytest.param("demo/full", marks=pytest.mark.endurance)])
def test_both_runtimes_recognise_the_recording(cell, tmp_path):
    pytest.importorskip("sherpa_onnx")
    found = sherpa.measure(cell, *prepare("demo", tmp_path), repetitions=2)
    for name in (OURS, THEIRS):
        assert len(found[name]["seconds"]) == 2
        assert min(found[name]["seconds"]) > 0
        assert found[name]["text"]
        assert len(found[name]["load_s"]) == 3


def made_up(ours, theirs):
    runtimes = {OURS: ours, THEIRS: theirs}
    return {"audio_s": 2.0} | {
        name: {"seconds": seconds, "peak_mb": 100.4, "load_s": [0.123, 0.1, 0.2]} for name, seconds in runtimes.items()
    }


def test_the_table_shows_both_and_judges_at_full_size_alone():
    assert ratio(made_up([1.0, 20.0, 3.0], [1.0, 10.0, 2.0])).median == 1.5  # of rounds
    cells = {"dense-225m/streaming": made_up([1.0, 1.1, 1.2], [1.0, 1.0, 1.0]), "demo/full": made_up([2.0], [1.0])}
    results = {"cells": cells, "sherpa_onnx": {"onnxruntime": "1.28.2"}}
    found = values(results)
    assert (found["onnxruntime"], found["dense-225m.streaming"], found["demo.full"]) == ("1.28.2", "1.10", "2.00")
    assert (
        "| dense-225m, streaming | 0.5500 (0.5250-0.5750) | 0.5000 (0.5000-0.5000) | 1.100 (1.050-1.150) "
        "| 100 / 100 | 0.12 (0.11-0.16) / 0.12 (0.11-0.16) |" in found["table"].splitlines()
    )
    assert [target.met for target in targets(results)] == [False]
