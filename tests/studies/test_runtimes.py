"""The study of the runtimes: differences and times."""

import json
import sys

import pytest

from u2moe.benchmarks.studies import runtimes
from u2moe.benchmarks.studies.runtimes import CPP, PYTHON, Program, compared, segments_of, sherpa_lines, summary
from u2moe.benchmarks.studies.shared.programs import write_wav


def segment(score=1.0, **changes):
    words = [{"word": "A", "start": 0.1, "end": 0.2, "confidence": 0.5}]
    found = {"text": "A", "tokens": [1], "times": [0.1], "words": words, "nbest": [{"tokens": [1], "score": score}]}
    return {**found, **changes}


def test_differences_are_counted_by_aspect_and_lines_have_segments_and_times(tmp_path):
    expected = [[segment()], [segment()], [segment()], []]
    found = [[segment()], [segment(text="B", tokens=[2])], [segment(score=1.5)], [segment()]]
    assert compared(expected, found) == {
        "num_recordings": 4, "text": 2, "tokens": 2, "times": 1, "words": 1, "nbest": 1, "score": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="argument 2"):
        compared(expected, found[:3])
    files = [tmp_path / "a", tmp_path / "b"]
    lines, mb = Program(command=[sys.executable, "-c", PROGRAM]).run([*files, *files])
    assert [[item["tokens"] for item in own] for own in segments_of(lines, files)] == [[[0], [2]], [[1], [3]]]
    assert segments_of([{"file": str(files[0]), "segments": [{"text": "A"}]}], files) == [[{"text": "A"}], []]
    assert summary([(lines, mb), (lines, 2000.4), (lines, mb)], 2, 3.0) == {"load": 0.4, "rtf": 0.01, "mb": 2000}
    with pytest.raises(ValueError, match="a round needs 4 lines with times, two per file, got 3"):
        summary([([{"load_ms": 1, "ms": 1}] * 3, 0.0)], 2, 1.0)
    printed = "Elapsed seconds: 0.031, Audio duration (s): 1.5\n" * 2
    found = summary([(sherpa_lines("Recognizer created in 0.25 s\n", printed), 0.0)], 1, 1.0)
    assert found == {"load": 0.25, "rtf": 0.031, "mb": 0}
    with pytest.raises(RuntimeError, match="out of order"):
        Program(command=[sys.executable, "-c", "raise SystemExit('out of order')"]).run([tmp_path])


PROGRAM = """
import json, sys
for number, file in enumerate(sys.argv[1:]):
    print(json.dumps({"file": file, "text": "A", "tokens": [number]}))
    print(json.dumps({"file": file, "load_ms": 400, "ms": 90 if number < 2 else 10 * (number - 1)}))
"""


@pytest.mark.slow
def test_the_program_in_python_gives_segments_and_times_of_recognition_alone(bundle, sound, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "repository", lambda: tmp_path)
    files = [write_wav(tmp_path / f"{name}.wav", sound[:20_000], 16_000) for name in "ab"]
    lines, mb = runtimes.programs(bundle.path)[PYTHON].run([*files, *files])
    segments = segments_of(lines, files)
    assert compared(segments, segments) == {"num_recordings": 2, **dict.fromkeys(runtimes.ASPECTS, 0), "score": 0.0}
    timing = summary([(lines, mb)], 2, 1.0)
    assert min(timing["load"], timing["rtf"]) > 0
    assert timing["mb"] > 20


def test_one_part_is_kept_when_the_other_is_measured(tmp_path, monkeypatch, capsys):
    times = {PYTHON: {"load": 0.2, "rtf": 0.01, "mb": 60}, CPP: {"load": 0.1, "rtf": 0.0095, "mb": 50}}
    monkeypatch.setattr(runtimes, "measure_speed", lambda *_: {"runtimes": times})
    monkeypatch.setattr(runtimes, "measure_same", lambda *_: {"found": {"int8": {PYTHON: compared([], [])}}})
    file = tmp_path / "results.json"
    runtimes.main(["--speed", "--results", str(file)])
    runtimes.main(["--bundle", "int8=folder", "--results", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    shown = runtimes.values(results)
    assert "| C++ | 0.10 | 0.0095 | 50 |" in shown["speed.table"]
    assert shown["int8.other_texts"] == "0"
    assert shown["speed.kernels"] in ("native kernels", "onnxruntime alone")
    assert shown["same.table"] in capsys.readouterr().out
    assert [target.met for target in runtimes.targets(results)] == [False, True]
