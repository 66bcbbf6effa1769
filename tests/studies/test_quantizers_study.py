"""The study of other quantizers: its hard network, plain graphs, and table."""

import json

import numpy as np
import onnx
import onnx.inliner
import pytest
from noise import write_noise

from u2moe.benchmarks.studies import quantizers, quantizing_memory
from u2moe.benchmarks.studies.quantizers import GRAPHS, plain_model
from u2moe.quantize import Goal


@pytest.mark.slow
def test_the_hard_network_computes_the_same_as_plain_operators_do(bundle, tmp_path):
    hard = quantizers.with_outliers(bundle, tmp_path / "hard")
    frames = np.random.default_rng(0).normal(size=(90, bundle.manifest.features.num_mel_bins)).astype(np.float32)
    expected, scaled = (each.load(quantizers.SETTINGS) for each in (bundle, hard))
    np.testing.assert_array_equal(scaled.ctc(scaled.encode(frames)), expected.ctc(expected.encode(frames)))
    files = [tmp_path / f"{name}.onnx" for name in GRAPHS]
    for file in files:
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(bundle.path / file.name)), file)
    model, sessions = plain_model(bundle, files)
    found = model.ctc(model.encode(frames))
    np.testing.assert_allclose(found, expected.ctc(expected.encode(frames)), rtol=0, atol=1e-4)
    assert [len(session.feeds) for session in sessions] == [1, 1]


def test_the_tables_leave_a_place_for_what_is_missing():
    item = {"log_probs_mean": 0.08, "changed_tokens": 0.03, "ms": 9.4, "seconds": 3, "bytes": 11_700_000, "kept": 2}
    own = {"float32": item, "int8": item, "int8, repaired": item}
    networks = {"plain": {**own, "peer": {"failed": "OSError: no"}}, "hard": own, "near ties": own}
    shown = quantizers.values({"networks": networks, "recordings": 3, "calibrated": 2})
    assert "| u2moe int8 | 0.080 | 3.0% | 0.080 | 3.0% | 11.7 | 9 | 3 |" in shown["table"]
    assert "| peer | — |  | — |  |  |  |  |" in shown["table"]
    assert "| demo model, near ties | 0.080 | 3.0% | — |  | 0.080 | 3.0% | 2 | 11.7 of 11.7 |" in shown["others"]


@pytest.mark.slow
def test_limits_are_judged_on_two_lists(bundle, tmp_path, monkeypatch):
    """A limit that is met becomes a row of numbers; one that cannot be met becomes its error."""
    runs = {
        "size": (quantizers.PLAIN, "int8", Goal(max_bytes=1e9)),
        "none": (quantizers.PLAIN, "int4", Goal(max_bytes=1)),
        "of another": (quantizers.HARD, "int8", Goal(max_bytes=1e9)),
    }
    monkeypatch.setattr(quantizers, "LIMITS", runs)
    recordings = sorted(write_noise(tmp_path, 3, 16_000).glob("*.wav"))
    lists = {"chose": recordings, "kept back": recordings[:1]}
    found = dict(quantizers.limited(bundle, quantizers.PLAIN, lists, tmp_path))
    assert found["size"]["kept back"]["recordings"] == 1
    assert "at most 1e-06 MB" in found["none"]["failed"]
    own = {"plain": {}, "hard": {}}
    shown = quantizers.values({"networks": own, "limits": found, "recordings": 1, "calibrated": 1})["limits"]
    assert shown.count(" to ") == 2
    assert len(shown.splitlines()) == 4


def test_memory_is_that_of_a_process_of_its_own(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantizing_memory, "MODES", {"--no-report": ["--no-report"]})
    file = tmp_path / "memory.json"
    quantizing_memory.main([str(bundle.path), "none.tsv", "--results", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["bytes"] == sum(own.size for own in bundle.manifest.files.values())
    assert 5e7 < found["peaks"]["--no-report"] < 1e9
    assert f"`u2moe quantize --no-report` | {found['peaks']['--no-report'] / 1e6:.0f} |" in capsys.readouterr().out
