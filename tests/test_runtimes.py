"""The comparison of runtimes: what counts as different, and what pages show."""

import json
import mmap
import os
import sys

import numpy as np
import pytest

from u2moe.benchmarks.results.provenance import measured_here
from u2moe.benchmarks.runtimes import equality, page_memory, programs, providers, speed
from u2moe.benchmarks.runtimes.first_difference import differences
from u2moe.benchmarks.runtimes.provider_operators import documented, lacking, operators_of, paper_table
from u2moe.benchmarks.studies.shared.segments import compared, of_json, of_python
from u2moe.benchmarks.studies.shared.timing import Timing, run_timed, timing_of
from u2moe.runtime import DecodingOptions, Recognizer


def segment(**changes):
    return {
        "text": "A",
        "tokens": [1],
        "times": [0.1],
        "words": [["A", 0.1, 0.2]],
        "nbest": [[1]],
        "score": 1.0,
        **changes,
    }


def test_the_first_difference_of_a_decision_is_told_from_that_of_a_sum():
    """Quantized values and the experts that routers choose are decisions."""
    names = [("sum", "Add in `a`"), ("experts", "TopK in `b`")]
    same = {"sum": np.zeros(4, np.float32), "experts": np.arange(4), "output": np.zeros(4, np.float32)}
    near = {**same, "sum": np.float32([0, 0, 1e-6, 0]), "output": np.full(4, 1e-6, np.float32)}
    far = {**near, "experts": np.array([0, 1, 3, 2]), "output": np.ones(4, np.float32)}
    found = differences(names, [same] * 3, [same, near, far])
    assert found["first"]["chunk"] == 1
    assert found["first"]["place"] == "Add in `a`"
    assert (found["rounded"]["chunk"], found["rounded"]["place"]) == (2, "TopK in `b`")
    assert found["rounded"]["num_different"] == 2
    assert (found["before"], found["after"]) == (pytest.approx(1e-6), 1)


def test_differences_are_counted_by_aspect():
    expected = [[segment()], [segment()], [segment()], []]
    found = [[segment()], [segment(text="B", tokens=[2])], [segment(score=1.5)], [segment()]]
    assert compared(expected, found) == {
        "num_recordings": 4, "text": 2, "tokens": 2, "times": 1, "words": 1, "nbest": 1, "score": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="argument 2"):
        compared(expected, found[:3])


def test_segments_of_python_and_of_json_are_alike(bundle, model, sound):
    result = Recognizer(bundle, model, DecodingOptions(chunk_size=16)).transcribe(sound).segments[0]
    theirs = {
        "text": result.text,
        "tokens": result.tokens,
        "times": result.times,
        "words": [{"word": word.word, "start": word.start, "end": word.end} for word in result.words],
        "nbest": [{"tokens": item.tokens, "score": item.score} for item in result.nbest],
    }
    assert of_json(json.loads(json.dumps(theirs))) == of_python(result)


def test_one_graph_gives_what_python_gives(bundle, sound):
    samples = [(sound[:20_000] * 32767).astype(np.int16), np.zeros(100, np.int16)]
    expected = programs.in_python(bundle.path, samples, endpoint=False)
    found = programs.in_one_graph(bundle.path, samples)
    assert [item["tokens"] for item in found[0]] == [item["tokens"] for item in expected[0]] != [[]]
    assert [item["nbest"] for item in found[0]] == [item["nbest"] for item in expected[0]]


def test_pages_show_both_tables():
    item = {**compared([[segment()]], [[segment()]]), "clips": ["A"]}
    results = {"found": {"float32": {"Python": item, "C++": item}}, "browser": "1.2"}
    shown = equality.values(results)
    assert shown["table"].count("\n") == 3
    assert shown["same"] == "the same words"
    other = {"found": {"float32": {"Python": item, "C++": {**item, "clips": ["B"]}}}, "browser": "1.2"}
    assert equality.values(other)["same"] == "not all the same words"
    runtimes = {
        "C++": {"load": 0.5, "rtf": 0.01, "mb": 60},
        "Chromium, WebAssembly": {"load": 1, "rtf": 0.02, "mb": 150},
    }
    measured = {
        "runtimes": runtimes, "cold": 1.0, "warm": 0.5, "loads": {"onnx": 0.3, "ort": 0.1},
        "sizes": {"model": 12e6, "ort": 14e6},
        "memory": {"minutes": 60, "real_time": True, "num_segments": 9, "samples": hour_of_memory(leak=0),
                   **measured_here()},
    }  # fmt: skip
    shown = speed.values(measured)
    assert "| C++ | 0.50 | 0.0100 | 60 |" in shown["table"]
    assert (shown["ort_load"], shown["memory_verdict"], shown["first_peak"]) == ("100", "flat", "184")


def hour_of_memory(leak):
    """Sound comes in for ten minutes, garbage for four samples at a time; `leak` is in MB an hour."""
    minutes = np.arange(1, 121) / 2
    sizes = 160 + 2 * np.minimum(minutes, 10) + np.arange(120) % 4 * 1.5 + leak * minutes / 60
    return list(zip(minutes.tolist(), sizes.round(1).tolist(), strict=True))


def test_memory_is_flat_if_it_rises_by_less_than_it_scatters():
    trend = page_memory.trend_of(hour_of_memory(leak=0))
    assert (trend.first_peak, trend.second_peak, trend.is_flat) == (184.5, 184.5, True)
    assert abs(trend.slope) < 1
    assert 1.5 < trend.scatter < 2
    leaking = page_memory.trend_of(hour_of_memory(leak=12))
    assert leaking.slope == pytest.approx(12, abs=1)
    assert not leaking.is_flat
    late = [(minute, size + 40 * (minute == 50)) for minute, size in hour_of_memory(leak=0)]
    assert page_memory.trend_of(late).rise < page_memory.trend_of(late).scatter
    assert not page_memory.trend_of(late).is_flat
    with pytest.raises(ValueError, match=r"found 3 samples after minute 10\.5, expected at least 6"):
        page_memory.trend_of(hour_of_memory(leak=0)[:23])
    with pytest.raises(SystemExit):
        speed.main(["--memory-minutes", "10"])


def test_private_memory_is_that_of_one_process():
    with mmap.mmap(-1, 50_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # malloc may keep what is freed
        held.write(bytes([1]) * 50_000_000)
        before = page_memory.private_mb(os.getpid())
    assert 30 < before - page_memory.private_mb(os.getpid()) < 70
    assert page_memory.private_mb(2**30) == 0


PROGRAM = """
import json, sys, time
for number, file in enumerate(sys.argv[1:]):
    print(json.dumps({"file": file, "segments": []}))
    print(json.dumps({"file": file, "load_ms": 400, "ms": 90 if number < 2 else 10 * (number - 1)}))
time.sleep(1)  # its memory is looked at now and then
"""


def test_times_are_those_of_the_second_time_without_loading(tmp_path):
    timing = run_timed([sys.executable, "-c", PROGRAM], [tmp_path / "a", tmp_path / "b"])
    assert (timing.load, timing.took) == (0.4, 0.03)
    assert timing.mb > 1
    assert speed.summary([timing, Timing(load=0.5, took=0.03, mb=2000.4), timing], 3.0) == {
        "load": 0.4, "rtf": 0.01, "mb": 2000,
    }  # fmt: skip
    node = [{"segments": [], "loadMs": 1500.0, "ms": ms} for ms in (80, 20)]
    assert timing_of(node, 1) == Timing(load=1.5, took=0.02, mb=0.0)


def test_times_that_are_missing_are_no_zeros(tmp_path):
    with pytest.raises(ValueError, match="expected times of 2 files twice, found 3 lines with times"):
        timing_of([{"load_ms": 1, "ms": 1}] * 3, 2)
    with pytest.raises(ValueError, match="found 0 lines with times"):
        timing_of([{"text": "A"}], 1)
    with pytest.raises(RuntimeError, match="out of order"):
        run_timed([sys.executable, "-c", "raise SystemExit('out of order')"], [tmp_path])


@pytest.mark.slow
def test_the_program_in_python_times_recognition_alone(bundle, sound, tmp_path):
    file = programs.write_wav(tmp_path, [(sound[:20_000] * 32767).astype(np.int16)], 16_000)[0]
    timing = run_timed([sys.executable, "-m", "u2moe.benchmarks.studies.shared.python_program", bundle.path], [file])
    assert timing.load > 0
    assert timing.took > 0
    assert timing.mb > 20


def test_operators_that_providers_lack(quantized):
    """Calls of functions count as the nodes within; lists of operators name their source."""
    operators = operators_of(quantized("int8").path)
    assert operators["com.microsoft:MatMulIntegerToFloat"] > 20
    assert not {"Constant", "Identity", "Int8MatMul"} & set(operators)
    assert lacking({"MatMul": 2, "TopK": 3, "Softmax": 1}, "XNNPACK") == {"TopK": 3}
    assert "com.microsoft:MatMulIntegerToFloat" in lacking(operators, "CoreML")
    assert set(lacking(operators, "DirectML")) == set()
    shown = paper_table({"int8": {"TopK": 3, "Relu": 1}})
    assert "| CoreML | int8 | 3 of 4 | `TopK` |" in shown
    for item in documented().values():
        assert len(item["commit"]) == 40
        assert "of microsoft/onnxruntime" in item["page"]


def test_a_provider_that_crashes_is_a_row():
    assert providers.apart(dict, [("texts", ["A"])]) == {"texts": ["A"]}
    assert providers.apart(os.abort) == {"error": "the process was ended by SIGABRT"}
    with pytest.raises(RuntimeError, match="int failed in its process"):
        providers.apart(int, "x")


@pytest.mark.parametrize("folder", ["/home/someone/bundle/", "runtime/demo/", ""])
def test_reasons_of_providers_hold_no_paths(folder):
    assert providers.reason_of(ValueError(f"{folder}encoder.onnx: X did not start")) == "encoder.onnx: X did not start"


def test_providers_that_do_not_run_are_rows_with_a_reason():
    ran = {
        "texts": ["A"],
        "cpu": 0.1,
        "seconds": 10.0,
        "nodes": {"CPUExecutionProvider": 8, "XProvider": 2},
    }
    error = providers.reason_of(ValueError("a\n/home/someone/bundle/encoder.onnx: X did | not start"))
    found = {
        "p 1": {"float32": {"CPUExecutionProvider": ran, "XProvider": {**ran, "texts": ["B"]}, "Y": {"error": error}}}
    }
    shown = providers.values({"found": found, "operators": {"float32": {"MatMul": 1}}})
    assert "| p 1 | float32 | CPU | same | 0.0100 | 2 of 10 |" in shown["table"]
    assert "| p 1 | float32 | XProvider | other | 0.0100 | 8 of 10 |" in shown["table"]
    assert "| p 1 | float32 | Y | does not run |" in shown["table"]
    assert "| p 1 | float32 | Y | a encoder.onnx: X did / not start |" in shown["reasons"]
