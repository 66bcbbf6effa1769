"""Other recognisers behind one interface, their environments, and how texts with digits are read."""

import os
import sys
import zipfile

import pytest

from u2moe.benchmarks.studies import systems
from u2moe.benchmarks.studies.shared.engines import ENGINES
from u2moe.benchmarks.studies.shared.environments import committed_source, make_environment
from u2moe.benchmarks.studies.shared.process import PeerError, PeerProcess, write_wav
from u2moe.benchmarks.studies.shared.readings import readings
from u2moe.benchmarks.studies.systems import CLIPS, PEERS, num_errors, single_core, values
from u2moe.runtime.corpus.lists import read_recordings

pytestmark = pytest.mark.slow


def test_ours_recognises_the_clips_as_a_stream_and_whole(tmp_path, capsys, monkeypatch):
    made = {"python": sys.executable, "installed_bytes": 123_000_000}
    monkeypatch.setattr(systems, "environment", lambda *_: made)
    monkeypatch.setattr(systems, "REPETITIONS", 2)
    results = tmp_path / "results.json"
    systems.main([str(tmp_path), "--results", str(results), "--peers", "u2moe", "u2moe-whole"])
    content = systems.resumed(results, {})
    streaming, whole = (content["clips"][name] for name in ("u2moe", "u2moe-whole"))
    for item in (streaming, whole):
        assert item["words"] == sum(len(recording.transcript.split()) for recording in read_recordings(CLIPS))
        assert item["errors"] <= 3
        assert 5 < item["audio_s"] < 30
    assert streaming["first_partial_s"]["p50"] < whole["first_partial_s"]["p50"]
    assert content["peers"]["u2moe"]["versions"]["u2moe"]
    found = values(content)
    assert "| u2moe demo model, chunks of 16 | yes | 123 |" in found["costs"]
    assert found["table"] in capsys.readouterr().out
    assert float(found["rtf.u2moe"]) > 0


def test_every_peer_has_an_engine_and_a_fixed_version():
    assert {peer.engine for peer in PEERS.values()} <= ENGINES.keys()
    for peer in PEERS.values():
        assert all("==" in item or "{u2moe}" in item for item in peer.requirements)


def test_children_have_one_core_and_one_thread():
    before = os.environ.get("OMP_NUM_THREADS"), os.sched_getaffinity(0)
    with single_core():
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert len(os.sched_getaffinity(0)) == 1
    assert (os.environ.get("OMP_NUM_THREADS"), os.sched_getaffinity(0)) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("735", ["SEVEN HUNDRED THIRTY FIVE", "SEVEN THREE FIVE", "SEVEN THIRTY FIVE"]),
        ("It's 7:15 p.m.", ["IT'S SEVEN FIFTEEN P M", "IT'S SEVEN ONE FIVE P M"]),
        ("in 1984", ["IN ONE THOUSAND NINE HUNDRED EIGHTY FOUR", "IN ONE NINE EIGHT FOUR", "IN NINETEEN EIGHTY FOUR"]),
        ("007", ["ZERO ZERO SEVEN"]),
        ("the 21st & 5%", ["THE TWENTY FIRST AND FIVE PERCENT"]),
        ("Mr. Smith", ["MISTER SMITH"]),
        ("", [""]),
    ],
)
def test_readings(text, expected):
    assert [" ".join(reading) for reading in readings(text)] == expected
    assert num_errors("SEVEN THREE FIVE", "736") == 1


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
    marker = folder / "marker"
    marker.touch()
    assert make_environment(folder, [str(wheel)]) == made
    assert marker.exists()
    with pytest.raises(RuntimeError, match=r"missing\.whl: cannot be installed: .+"):
        make_environment(folder, [str(tmp_path / "missing.whl")])
    assert not folder.exists()


def test_the_source_is_that_of_the_last_commit(tmp_path, request, monkeypatch):
    if not (request.config.rootpath / ".git").exists():
        pytest.skip("not a clone")
    monkeypatch.chdir(request.config.rootpath)
    assert (committed_source(tmp_path / "source") / "pyproject.toml").is_file()


def test_a_recording_that_fails_is_told_and_the_peer_goes_on(tmp_path, sound):
    good = write_wav(tmp_path / "good.wav", sound[:16000], 16000)
    with PeerProcess("u2moe", {"chunk_size": 16}) as peer:
        with pytest.raises(PeerError, match=r"u2moe: missing\.wav: FileNotFoundError"):
            peer.recognise(tmp_path / "missing.wav")
        assert peer.recognise(good)["audio_s"] == 1.0


def test_a_missing_package_is_reported(tmp_path, monkeypatch):
    """Whatever is installed: a package of that name comes first, and itself misses another."""
    (tmp_path / "pocketsphinx.py").write_text("import what_nobody_has_installed\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PeerError, match=r"pocketsphinx: ended: exit code 1: .*No module named 'what_nobody_has_"):
        PeerProcess("pocketsphinx", {})
