import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks import soak
from u2moe.runtime.accuracy import read_manifest


@pytest.fixture(scope="module")
def manifest(recognizer, sound, tmp_path_factory):
    """Two recordings, and what the tiny model hears in each."""
    folder = tmp_path_factory.mktemp("soak")
    lines = []
    for number in range(2):
        samples = np.concatenate([np.roll(sound, 9000 * number), np.zeros(32_000, np.float32)])
        soundfile.write(folder / f"{number}.wav", samples, 16_000)
        lines.append(f"{number}.wav\t{recognizer.transcribe(folder / f'{number}.wav').text}")
    (folder / "test.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "test.tsv"


@pytest.fixture(scope="module")
def report(bundle, manifest):
    return soak.soak(bundle.path, read_manifest(manifest), hours=15 / 3600, num_streams=5)


def test_a_short_soak(report):
    assert report.stream.audio_s >= 15
    assert report.stream.num_segments >= 1
    assert report.stream.memory.end_mb > 0
    assert report.streams.num_streams == 5
    assert report.file.audio_s >= 15
    assert report.file.num_recordings >= 2
    assert report.file.num_words == report.file.num_heard_alone > 0
    assert report.file.num_errors_alone == 0  # the transcripts are what is heard
    # Seconds are too few to judge memory by, and what noise "says" depends on what is around it.
    assert not {"segments out of order", "streams together gave another text", "random portions gave another text"} & {
        *report.failures
    }


@pytest.mark.parametrize(
    ("part", "changes", "failure"),
    [
        ("stream", {"num_disordered": 1}, "segments out of order"),
        ("stream", {"memory": soak.Memory(start_mb=100, end_mb=111)}, "memory of the long stream grew"),
        ("file", {"memory": soak.Memory(start_mb=100, end_mb=111)}, "memory of the long file grew"),
        ("streams", {"num_different": 1}, "streams together gave another text"),
        ("streams", {"num_split_different": 1}, "random portions gave another text"),
        ("file", {"num_heard": 10, "num_heard_alone": 11}, "words of the long file were lost or doubled"),
        ("file", {"num_errors": 9, "num_errors_alone": 1, "num_words": 99}, "words of the long file were lost or"),
    ],
)
def test_what_is_a_failure(report, part, changes, failure):
    flat = soak.Memory(start_mb=100, end_mb=109)
    good = soak.SoakReport(
        stream=replace(report.stream, memory=flat),
        streams=report.streams,
        file=replace(report.file, memory=flat, num_heard=9, num_heard_alone=9, num_errors=0, num_errors_alone=0),
    )
    assert good.failures == []
    (found,) = replace(good, **{part: replace(getattr(good, part), **changes)}).failures
    assert found.startswith(failure)


def test_streams_that_hear_something_else_are_counted(recognizer, manifest, monkeypatch):
    """Portions that lose a sample, as a fault would."""
    portions = soak._portions

    def lossy(samples, random, rate):
        return portions(samples if random is None else samples[8000:], random, rate)

    monkeypatch.setattr(soak, "_portions", lossy)
    found = soak.hear_many(recognizer, read_manifest(manifest), 3, np.random.default_rng(0))
    assert (found.num_different, found.num_split_different) == (0, 3)


def test_the_report_of_the_command(bundle, manifest, tmp_path, capsys):
    file = tmp_path / "soak.json"
    arguments = [str(bundle.path), str(manifest), "--hours", str(6 / 3600), "--streams", "2", "--output", str(file)]
    code = soak.main(arguments)  # its verdict on memory is not tested: seconds are too few
    out = capsys.readouterr().out
    results = json.loads(file.read_text(encoding="utf-8"))
    assert code == bool(results["failures"])
    assert soak.table(results) in out
    assert "| 2 streams at once |" in out
