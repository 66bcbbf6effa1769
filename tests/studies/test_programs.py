"""The studies that run other programs: runtimes, recognisers, simulators of NPUs and attackers."""

import multiprocessing
import sys
import zipfile
from multiprocessing.synchronize import Event

import pytest

from u2moe.benchmarks.studies import hostile, runtimes, simulators, systems
from u2moe.benchmarks.studies.runtimes import CPP, PYTHON, compared, segments_of, summary
from u2moe.benchmarks.studies.shared.programs import Program, make_environment, on_one_core, sherpa_lines, write_wav
from u2moe.benchmarks.studies.simulators import FIXED, PLAIN, QDQ
from u2moe.benchmarks.studies.systems import PEERS, whole_chunks
from u2moe.runtime.model.encoder import Windows
from u2moe.runtime.model.features import fbank


@pytest.mark.slow
def test_attackers_must_outlive_the_speakers(monkeypatch):
    monkeypatch.setattr(hostile, "_AHEAD_S", 0.0)
    with hostile.meanwhile(hostile.burn, [0], 19):
        pass
    with pytest.raises(RuntimeError, match="set ended before the speakers did"), hostile.meanwhile(Event.set):
        [child.join() for child in multiprocessing.active_children()]


def segment(score=1.0, **changes):
    words = [{"word": "A", "start": 0.1, "end": 0.2, "confidence": 0.5}]
    found = {"text": "A", "tokens": [1], "times": [0.1], "words": words, "nbest": [{"tokens": [1], "score": score}]}
    return {**found, **changes}


PROGRAM = """
import json, sys
for number, file in enumerate(sys.argv[1:]):
    print(json.dumps({"file": file, "text": "A", "tokens": [number]}))
    print(json.dumps({"file": file, "load_ms": 400, "ms": 90 if number < 2 else 10 * (number - 1)}))
"""


def test_differences_are_counted_by_aspect_and_lines_have_segments_and_times(tmp_path):
    expected = [[segment()], [segment()], [segment()], []]
    found = [[segment()], [segment(text="B", tokens=[2])], [segment(score=1.5)], [segment()]]
    counts = {"text": 2, "tokens": 2, "times": 1, "words": 1, "nbest": 1}
    assert compared(expected, found) == {"num_recordings": 4, **counts, "score": 0.5}
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


def test_one_part_is_kept_when_the_other_is_measured(monkeypatch, study):
    times = {PYTHON: {"load": 0.2, "rtf": 0.01, "mb": 60}, CPP: {"load": 0.1, "rtf": 0.0095, "mb": 50}}
    monkeypatch.setattr(runtimes, "measure_speed", lambda *_: {"runtimes": times})
    monkeypatch.setattr(runtimes, "measure_same", lambda *_: {"found": {"int8": {PYTHON: compared([], [])}}})
    study(runtimes, "--speed", table="speed.table")
    results = study(runtimes, "--bundle", "int8=folder", table="same.table")
    shown = runtimes.values(results)
    assert "| C++ | 0.10 | 0.0095 | 50 |" in shown["speed.table"]
    assert shown["int8.other_texts"] == "0"
    assert shown["speed.kernels"] in ("native kernels", "onnxruntime alone")


@pytest.mark.slow
def test_variants_are_compared_with_the_float_graph(small_bundle, clips, tmp_path, monkeypatch, study):
    """Variants of onnxruntime. Missing environments are skipped, compile errors reported, and work is kept."""
    files, work = sorted(clips.glob("*.wav")), tmp_path / "work"
    (tmp_path / "list.tsv").write_text("".join(f"{file}\tone two\n" for file in files))
    variants = dict.fromkeys((PLAIN, FIXED, QDQ), ("",)) | {"litert int8": ("litert", "int8")}
    monkeypatch.setattr(simulators, "VARIANTS", variants)
    monkeypatch.setattr(simulators, "_version", lambda python, package: "1.0")
    work.mkdir()
    (work / "litert_int8.jsonl").write_text('{"refused": "no lowering of Min"}\n')
    arguments = [small_bundle.path, tmp_path / "list.tsv", "--calibration", *files, "--work-dir", work]
    arguments += ["--python", "litert=python"]
    simulators.main([*map(str, arguments), "--only", PLAIN])
    (work / "float32.jsonl").write_text("".join((work / "float32.jsonl").read_text().splitlines(keepends=True)[:-1]))
    results = study(simulators, *arguments)
    found = results["variants"]
    assert found["litert int8"] == {"refused": "no lowering of Min"}
    assert (found[PLAIN]["different"], found[PLAIN]["same_best_tokens"]) == (0, 1)
    assert found[PLAIN]["recordings"] == found[QDQ]["recordings"] == len(files)
    assert 0.9 < found[QDQ]["least_cosine"] < 1
    assert found[FIXED]["cosine"] < 1
    assert found[PLAIN]["spoken"] == 2 * len(files)
    assert "| ai-edge-litert 1.0 | int8 | no lowering of Min |" in simulators.values(results)["table"]


@pytest.mark.slow
def test_ours_recognises_the_clips_as_a_stream_and_whole(tmp_path, monkeypatch, study):
    made = {"python": sys.executable, "installed_bytes": 123_000_000}
    shorter = {"environment": lambda *_: made, "REPETITIONS": 1, "clips": lambda own=systems.clips: own()[:2]}
    peers = {name: PEERS[name] for name in ("u2moe", "u2moe-whole")}
    for name, value in (shorter | {"PEERS": peers}).items():
        monkeypatch.setattr(systems, name, value)
    content = study(systems, tmp_path, "--groups", "clips")
    streaming, whole = (content["clips"]["peers"][name] for name in peers)
    assert 2 < streaming["audio_s"] == whole["audio_s"] < 30
    assert streaming["first_partial_s"]["p50"] < whole["first_partial_s"]["p50"]
    assert streaming["versions"]["u2moe"]
    found = systems.values(content)
    assert found["table"].splitlines()[2].endswith(" | 123 |")
    assert float(found["rtf.u2moe"]) > 0


def test_the_recording_for_sherpa_fills_whole_chunks_and_programs_have_one_core(bundle):
    manifest = bundle.manifest
    samples = whole_chunks(manifest)

    def num_chunks(samples):
        windows = Windows(manifest.model, 16)
        windows.accept(fbank(samples, manifest.features))
        return sum(windows.take() is not None for _ in range(100))

    assert num_chunks(samples) == num_chunks(samples[:-1]) + 1
    assert len(samples) <= 10 * manifest.features.sample_rate
    code = "import json, os; print(json.dumps([os.environ['OMP_NUM_THREADS'], len(os.sched_getaffinity(0))]))"
    ((found,), _) = on_one_core(Program(command=[sys.executable, "-c", code])).run([])
    assert found == ["1", 1]


@pytest.mark.endurance
def test_an_environment_is_made_once_and_weighed(tmp_path):
    wheel, folder = tmp_path / "little-1.0-py3-none-any.whl", tmp_path / "environment"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("little.py", "#" * 1000)
        archive.writestr("little-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: little\nVersion: 1.0\n")
        archive.writestr("little-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("little-1.0.dist-info/RECORD", "little.py,,\n")
    made = make_environment(folder, [str(wheel)])
    assert 1000 < made["installed_bytes"] < 3000
    (folder / "marker").touch()
    assert make_environment(folder, [str(wheel)]) == made
    assert (folder / "marker").exists()
    with pytest.raises(RuntimeError, match=r"cannot install .*missing\.whl: .+"):
        make_environment(folder, [str(tmp_path / "missing.whl")])
    assert not folder.exists()
