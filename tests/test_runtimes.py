"""The comparison of runtimes: what counts as different, and what pages show."""

import json

import numpy as np
import pytest

from u2moe.benchmarks.runtimes import equality, programs, speed
from u2moe.benchmarks.runtimes.segments import compared, of_json, of_python
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
        "Chromium, WebAssembly": {"load": 1, "rtf": 0.02, "mb": None},
    }
    measured = {
        "runtimes": runtimes, "cold": 1.0, "warm": 0.5, "loads": {"onnx": 0.3, "ort": 0.1},
        "sizes": {"model": 12e6, "ort": 14e6},
        "memory": {"minutes": 60, "num_segments": 9, "samples": [[5, 200.4], [60, 201]]},
    }  # fmt: skip
    shown = speed.values(measured)
    assert "| C++ | 0.50 | 0.0100 | 60 |" in shown["table"]
    assert (shown["ort_load"], shown["memory_first"], shown["memory_most"]) == ("100", "200", "201")
