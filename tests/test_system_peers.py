import json
import os
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from u2moe.benchmarks.peers import systems as system_peers
from u2moe.benchmarks.studies.shared.engines import ENGINES
from u2moe.benchmarks.studies.shared.environment import PeerEnvironment, copy_source, digest, make_environment
from u2moe.benchmarks.studies.shared.process import PeerError, PeerProcess, write_wav
from u2moe.benchmarks.studies.shared.readings import cardinal, ordinal, readings
from u2moe.benchmarks.studies.systems import CLIPS, PEERS, RecordingSet, main, num_errors, run, single_core, values
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import Recording, read_manifest

pytestmark = pytest.mark.slow

CLIP_RECORDINGS = read_manifest(DEMO_FOLDER / "clips" / "transcripts.txt")


@pytest.fixture
def here(monkeypatch):
    """Everything is installed in the environment that runs the tests. Returns what would have been installed."""
    made = []

    def make(folder, requirements, *, made_of, progress):
        made.append((folder.name, list(requirements), made_of))
        return PeerEnvironment(python=Path(sys.executable), installed_bytes=123_000_000)

    monkeypatch.setattr(system_peers, "make_environment", make)
    return made


def reply(text, *, compute_s=1.0, first_partial_s=0.5, final_s=0.1):
    return {
        "text": text, "audio_s": 2.0, "compute_s": compute_s, "cpu_s": compute_s, "first_partial_s": first_partial_s,
        "final_s": final_s, "peak_mb": 50.0,
    }  # fmt: skip


def test_ours_recognises_the_clips_as_a_stream_and_whole(here, tmp_path):
    results, sets = tmp_path / "results.json", [RecordingSet(name=CLIPS, recordings=CLIP_RECORDINGS, repetitions=2)]
    content = run(tmp_path, results, sets, names=["u2moe", "u2moe-whole"], source=Path(__file__).parents[1])
    assert content == json.loads(results.read_text())
    source = tmp_path / "u2moe-source"  # one environment for both
    assert here == [("u2moe", [f"u2moe[cpu] @ file://{source}"], digest(source))]
    assert (tmp_path / "u2moe-source" / "pyproject.toml").exists()
    streaming, whole = (content["sets"][CLIPS][name] for name in ("u2moe", "u2moe-whole"))
    for item in (streaming, whole):
        assert item["words"] == sum(len(recording.transcript.split()) for recording in CLIP_RECORDINGS)
        assert item["errors"] <= 3
        assert len(item["compute_s"]) == 2
        assert item["final_s"]["count"] == 2 * len(CLIP_RECORDINGS)
        assert 5 < item["audio_s"] < 30
    lengths = [file.stat().st_size / 32000 for file in (tmp_path / "recordings").iterdir()]
    assert streaming["first_partial_s"]["max"] < max(lengths)
    assert whole["first_partial_s"]["p50"] > sorted(lengths)[1]
    assert content["peers"]["u2moe"]["installed_bytes"] == 123_000_000
    assert len(content["peers"]["u2moe"]["load_s"]) == 3
    assert content["peers"]["u2moe"]["versions"]["u2moe"]
    found = values(content)
    assert "| u2moe demo model, chunks of 16 | yes | 123 |" in found["costs"]
    assert found["size_of_bundled_clips"].startswith("3 recordings, ")
    assert float(found["rtf.u2moe"]) > 0


def test_a_list_for_words_alone_has_no_times(here, tmp_path):
    sets = [RecordingSet(name="list", recordings=CLIP_RECORDINGS[:1], timed=False)]
    content = run(tmp_path, tmp_path / "results.json", sets, names=["u2moe-whole"])
    assert content["sets"]["list"]["u2moe-whole"].keys() == {"words", "errors", "texts", "audio_s"}
    assert values(content)["list"].startswith("|  | word errors |\n")


def test_results_keep_sets_and_peers_that_are_not_measured_again(here, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"peers": {"moonshine": {}}, "sets": {"a": {}, "list": {"moonshine": {"words": 1}}}}))
    sets = [RecordingSet(name="list", recordings=CLIP_RECORDINGS[:1], timed=False)]
    content = run(tmp_path, results, sets, names=["u2moe-whole"])
    assert content["sets"]["a"] == {}
    assert content["sets"]["list"].keys() == {"moonshine", "u2moe-whole"}
    assert content["peers"].keys() == {"moonshine", "u2moe-whole"}


def test_summary_is_over_recordings_and_rounds():
    rounds = [
        [reply("one two", compute_s=1.0, final_s=0.3), reply("one", compute_s=2.0, final_s=0.1)],
        [reply("x", compute_s=10.0), reply("three", compute_s=20.0, first_partial_s=4.0)],
    ]
    found = system_peers._summary(rounds, ["ONE", "FOUR"], timed=True)
    assert (found["words"], found["errors"], found["texts"]) == (2, 1, ["one", "three"])
    assert found["compute_s"] == [11.0, 22.0]
    assert found["audio_s"] == 4.0
    assert found["first_partial_s"]["max"] == 4.0
    assert found["final_s"]["max"] == 0.3
    assert found["peak_mb"] == 50.0
    peers = {"u2moe": {"versions": {"python": "3", "u2moe": "0.1"}, "load_s": [0.5, 0.6, 0.4], "installed_bytes": 1e6}}
    tables = values({"peers": peers, "sets": {"list": {"u2moe": found}}})
    row = "| u2moe demo model, chunks of 16 | 50.0% | 4.125 (3.438-4.812) | 0.50, 2.95 | 0.100, 0.240 | 50 |"
    assert row in tables["list"]
    assert "| u2moe demo model, chunks of 16 | yes | 1 | 0.50 (0.45-0.55) | u2moe 0.1 |" in tables["costs"]


def test_every_peer_has_an_engine_and_a_fixed_version():
    assert {peer.engine for peer in PEERS.values()} <= ENGINES.keys()
    for peer in PEERS.values():
        assert all("==" in item or "{u2moe}" in item for item in peer.requirements)


def test_children_have_one_core_and_one_thread(tmp_path, sound):
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
        ("2 AM, I am", ["TWO A M I AM"]),
        ("in 1984", ["IN ONE THOUSAND NINE HUNDRED EIGHTY FOUR", "IN ONE NINE EIGHT FOUR", "IN NINETEEN EIGHTY FOUR"]),
        ("1,250,003", None),
        ("007", ["ZERO ZERO SEVEN"]),
        ("the 21st & 5%", ["THE TWENTY FIRST AND FIVE PERCENT"]),
        ("Mr. Smith", ["MISTER SMITH"]),
        ("go on", ["GO ON"]),
        ("", [""]),
    ],
)
def test_readings(text, expected):
    found = [" ".join(reading) for reading in readings(text)]
    if expected is None:
        assert found[0] == "ONE MILLION TWO HUNDRED FIFTY THOUSAND THREE"
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "ZERO"), (13, "THIRTEEN"), (80, "EIGHTY"), (1_000, "ONE THOUSAND")]
)
def test_cardinal(number, expected):
    assert cardinal(number) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(1, "FIRST"), (12, "TWELFTH"), (20, "TWENTIETH"), (99, "NINETY NINTH"), (4, "FOURTH")]
)
def test_ordinal(number, expected):
    assert ordinal(number) == expected


def test_errors_are_those_of_the_best_reading():
    assert num_errors("SEVEN THREE FIVE", "735") == 0
    assert num_errors("SEVEN THREE FIVE", "736") == 1
    assert num_errors("SEVEN FIFTEEN P M", "7:15 PM.") == 0
    assert num_errors("HELLO", "") == 1


@pytest.fixture
def wheel(tmp_path):
    """A package that needs nothing and holds 1000 bytes."""
    file = tmp_path / "little-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("little.py", "#" * 1000)
        archive.writestr("little-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: little\nVersion: 1.0\n")
        archive.writestr("little-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("little-1.0.dist-info/RECORD", "little.py,,\n")
    return file


def test_an_environment_is_made_once_and_weighed(wheel, tmp_path):
    made = []
    folder = tmp_path / "environment"
    environment = make_environment(folder, [str(wheel)], progress=made.append)
    assert 1000 < environment.installed_bytes < 3000
    assert next(folder.rglob("little.py")).stat().st_size == 1000
    assert make_environment(folder, [str(wheel)], progress=made.append) == environment
    assert made == [f"installing {wheel}"]
    make_environment(folder, [str(wheel)], made_of="another", progress=made.append)
    assert len(made) == 2


def test_what_cannot_be_installed_leaves_nothing(tmp_path, monkeypatch):
    def create(folder, *, with_pip):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(venv, "create", create)
    with pytest.raises(RuntimeError, match=r"missing\.whl: cannot be installed: .+"):
        make_environment(tmp_path / "environment", [str(tmp_path / "missing.whl")])
    assert not (tmp_path / "environment").exists()


def test_a_copy_of_the_source_holds_what_is_packaged(tmp_path):
    others = (".git/x", "tests/x", "runtime/__pycache__/x", "examples/x")
    for name in ("runtime/demo/tokens.txt", "examples/page/a.js", *others):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    packages = '[tool.setuptools.package-dir]\n"u2moe.runtime" = "runtime"\n"u2moe.page" = "examples/page"\n'
    (tmp_path / "from" / "pyproject.toml").write_text(packages)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "old").touch()
    copy = copy_source(tmp_path / "from", tmp_path / "to")
    files = sorted(str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file())
    assert files == ["examples/page/a.js", "pyproject.toml", "runtime/demo/tokens.txt"]
    before = digest(copy)
    assert digest(copy_source(tmp_path / "from", tmp_path / "to")) == before
    (copy / "pyproject.toml").write_text("other")
    assert digest(copy) != before


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


def test_command_takes_lists(here, tmp_path, capsys, sound):
    write_wav(tmp_path / "a.wav", sound, 16000)
    (tmp_path / "mine.tsv").write_text("a.wav\tHELLO\n")
    options = ["--peers", "u2moe-whole", "--no-clips", "--untimed", str(tmp_path / "mine.tsv")]
    main([str(tmp_path / "work"), "--results", str(tmp_path / "results.json"), *options])
    printed = capsys.readouterr().out
    assert "mine: 1 recordings, 4 s, 1 words" in printed
    assert CLIPS not in printed


def test_recordings_of_any_rate_are_recognised_at_one(here, tmp_path, sound):
    write_wav(tmp_path / "slow.wav", sound[:8000], 8000)
    sets = [RecordingSet(name="list", recordings=[Recording(path=tmp_path / "slow.wav", transcript="")], timed=False)]
    content = run(tmp_path, tmp_path / "results.json", sets, names=["u2moe-whole"])
    assert content["sets"]["list"]["u2moe-whole"]["audio_s"] == 1.0
