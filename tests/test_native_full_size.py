"""The measurement of native kernels at full size, on tiny models."""

import json

import pytest

from u2moe.benchmarks.full_size import native, threads
from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.export import random_checkpoint

pytestmark = pytest.mark.slow
pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)

SPREAD = Spread.of([1.0, 2.0]).data()


def bounds(*_):
    """Such as `measure_bound` finds."""
    entry = {"stages": {"encoder": SPREAD}, "parts": {"attention": {"least_s": 0.5}}, "audio_s": 3.0}
    cases = [case.key for case in native.CASES if case.model == native.MIXTURE and case.precision == "int8"]
    return {mode: dict.fromkeys(cases, entry) for mode in native.BOUNDS}


def starts(*_):
    """Such as `measure_footprint` finds."""
    entry = {"disk": {"files": 1e6}, "load_s": SPREAD, "loaded_bytes": SPREAD, "peak_bytes": SPREAD}
    return dict.fromkeys([*(case.key for case in native.CASES), native.PACKED_KEY], entry)


def rates(footprints, num_threads, *, progress):
    """Such as `measure_rates` finds: two threads read 1.25 times as fast as one, and multiply twice as fast."""
    progress(f"rates, threads: {num_threads}")
    read, products = ({"median": value} for value in ((16e9, 20e9)[num_threads - 1], 300e9 * num_threads))
    return {
        "read_bytes_per_s": {str(size): read for size in footprints},
        "multiply_adds_per_s": {"integer": {"sizes": {"largest": products}, "best": "largest"}},
    }


@pytest.fixture
def small(monkeypatch):
    """The models in the size of the preset "tiny", as few rounds as possible, and no processes of their own."""
    for name in (native.MIXTURE, native.SMALL):
        monkeypatch.setitem(random_checkpoint.PRESETS, name, random_checkpoint.PRESETS["tiny"])
    monkeypatch.setattr(native, "ROUNDS", dict.fromkeys(native.ROUNDS, 1))
    monkeypatch.setattr(threads, "ROUNDS", dict.fromkeys(threads.ROUNDS, 1))
    monkeypatch.setattr(threads, "measure_rates", rates)
    monkeypatch.setattr(native, "_bounds", bounds)
    monkeypatch.setattr(native, "_starts", starts)


def test_a_run_keeps_what_other_machines_measured(small, tmp_path, capsys):
    results = tmp_path / "native.json"
    results.write_text(json.dumps({"machines": {"another, avx2": {}}}), encoding="utf-8")
    native.main([str(tmp_path), "--prepare"])
    native.main([str(tmp_path), "--results", str(results)])
    machines = json.loads(results.read_text(encoding="utf-8"))["machines"]
    assert machines.pop("another, avx2") == {}
    ((key, own),) = machines.items()
    assert key == native.machine_key(own)
    assert own["kernels"]["native"]
    shown = native.values({"machines": machines})
    assert shown["tables"] in capsys.readouterr().out
    assert all(case.title in shown["tables"] for case in native.CASES)
    assert float(shown["gain.streaming"]) > 0
    (seconds,) = own["seconds"]["full"][native.BASELINE.key]
    dense_s = seconds / native.audio_seconds("full")
    assert float(shown["least.full"]) == pytest.approx(0.5 / 3 / dense_s, abs=0.005)
    targets = native.targets({"machines": machines})
    assert len({target.name for target in targets}) == len(targets) > 10
    assert all(target.value > 0 for target in targets)
    assert "| MoE-1B, int8, native, packed in advance | 1 | 1.50 (1.25-1.75) |" in shown["tables"]
    assert any(target.name.endswith("packed in advance: sessions") and not target.met for target in targets)
    native.main([str(tmp_path), "--threads", "--results", str(results)])
    own = json.loads(results.read_text(encoding="utf-8"))["machines"][key]
    printed = capsys.readouterr().out
    assert "| one thread | two threads | times as fast | equal |" in printed
    assert "| reading weights, GB/s | 16.0 | 20.0 | 1.25 |" in printed
    assert "| int8 products in the cache, billion multiply-adds/s | 300.0 | 600.0 | 2.00 |" in printed
    assert all(case["equal"] for case in own["threads"]["found"].values())
    shown = native.values({"machines": {key: own}})
    assert (shown["threads.read"], shown["threads.multiply"]) == ("1.25", "2.00")
    more = native.targets({"machines": {key: own}})
    assert len(more) == len(targets) + 6
