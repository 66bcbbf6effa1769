"""The studies of the runtimes: what counts as different, and times."""

import json
import sys

import numpy as np
import pytest

from u2moe.benchmarks.studies import runtimes, runtimes_speed
from u2moe.benchmarks.studies.runtimes import compared
from u2moe.benchmarks.studies.runtimes_speed import Timing, run_timed, timing_of
from u2moe.benchmarks.studies.shared import programs
from u2moe.runtime import DecodingOptions, Recognizer


def segment(**changes):
    words = [["A", 0.1, 0.2]]
    return {"text": "A", "tokens": [1], "times": [0.1], "words": words, "nbest": [[1]], "score": 1.0, **changes}


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
    assert programs.of_json(json.loads(json.dumps(theirs))) == programs.of_python(result)


def test_pages_show_both_tables():
    item = {**compared([[segment()]], [[segment()]]), "clips": ["A"]}
    results = {"found": {"float32": {"Python": item, "C++": item}}, "browser": "1.2"}
    assert runtimes.values(results)["table"].count("\n") == 3
    assert runtimes.values(results)["same"] == "the same words"
    other = {"found": {"float32": {"Python": item, "C++": {**item, "clips": ["B"]}}}, "browser": "1.2"}
    assert runtimes.values(other)["same"] == "not all the same words"
    measured = {"runtimes": {"C++": {"load": 0.5, "rtf": 0.01, "mb": 60}}, "loads": {"onnx": 0.3, "ort": 0.1}}
    shown = runtimes_speed.values(measured)
    assert "| C++ | 0.50 | 0.0100 | 60 |" in shown["table"]
    assert shown["ort_load"] == "100"


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
    found = runtimes_speed.summary([timing, Timing(load=0.5, took=0.03, mb=2000.4), timing], 3.0)
    assert found == {"load": 0.4, "rtf": 0.01, "mb": 2000}


def test_times_that_are_missing_are_no_zeros(tmp_path):
    with pytest.raises(ValueError, match="expected times of 2 files twice, found 3 lines with times"):
        timing_of([{"load_ms": 1, "ms": 1}] * 3, 2, 0.0)
    with pytest.raises(RuntimeError, match="out of order"):
        run_timed([sys.executable, "-c", "raise SystemExit('out of order')"], [tmp_path])


@pytest.mark.slow
def test_the_program_in_python_times_recognition_alone(bundle, sound, tmp_path):
    file = programs.write_wav(tmp_path, [(sound[:20_000] * 32767).astype(np.int16)], 16_000)[0]
    command = [sys.executable, "-m", "u2moe.benchmarks.studies.shared.python_program", bundle.path]
    timing = run_timed(command, [file])
    assert min(timing.load, timing.took) > 0
    assert timing.mb > 20
