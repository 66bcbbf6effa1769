"""Other recognisers with a common interface, and their environments."""

import sys
import zipfile

import pytest

from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.studies import systems
from u2moe.benchmarks.studies.shared.programs import Program, json_lines, make_environment, on_one_core
from u2moe.benchmarks.studies.systems import NATIVE, PEERS, SHERPA, STREAMING, targets, values, whole_chunks
from u2moe.runtime.model.encoder import Windows
from u2moe.runtime.model.features import fbank

pytestmark = pytest.mark.slow


def test_ours_recognises_the_clips_as_a_stream_and_whole(tmp_path, capsys, monkeypatch):
    made = {"python": sys.executable, "installed_bytes": 123_000_000}
    monkeypatch.setattr(systems, "environment", lambda *_: made)
    monkeypatch.setattr(systems, "REPETITIONS", 2)
    results = tmp_path / "results.json"
    monkeypatch.setattr(systems, "PEERS", {name: PEERS[name] for name in ("u2moe", "u2moe-whole")})
    systems.main([str(tmp_path), "--results", str(results), "--groups", "clips"])
    content = read_json(results)
    streaming, whole = (content["clips"]["peers"][name] for name in ("u2moe", "u2moe-whole"))
    assert 5 < streaming["audio_s"] == whole["audio_s"] < 30
    assert streaming["first_partial_s"]["p50"] < whole["first_partial_s"]["p50"]
    assert streaming["versions"]["u2moe"]
    found = values(content)
    assert found["table"] in capsys.readouterr().out
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

    def cost(title, *seconds):
        return {"title": title, "audio_s": 2.0, "compute_s": seconds, "peak_mb": 100.4, "load_s": [0.123, 0.1, 0.2]}

    peers = {NATIVE: cost("ours", 1.0, 20.0, 3.0), SHERPA: cost("theirs", 1.0, 10.0, 2.0)}
    machine = {"processor": "P", "commit": "c", "usable_cores": 2, "onnxruntime": "1"}
    results = {STREAMING: {"machine": machine, "date": "2026-01-01", "peers": peers}}
    found = values(results)
    assert found["native.streaming"] == "1.50"  # of rounds
    row = "| ours, streaming | 1.500 (1.000-5.750) | 1.50 (1.25-1.75) | 100 | 0.12 |"
    assert row in found["same_weights"].splitlines()
    assert [target.met for target in targets(results)] == [False]
    code = "import json, os; print(json.dumps([os.environ['OMP_NUM_THREADS'], len(os.sched_getaffinity(0))]))"
    ((found,), _) = on_one_core(Program(command=[sys.executable, "-c", code], read=json_lines)).run([])
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
