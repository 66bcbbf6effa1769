import json

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.studies import word_times
from u2moe.runtime import DecodingOptions, Result, Transcript, WordResult
from u2moe.runtime.corpus.lists import read_recordings


@pytest.fixture
def manifest(tmp_path):
    """Write recordings with a tone of half a second, which begins after a quarter of a second."""
    lines = []
    for number, word in enumerate(("ONE", "TWO", "TWO WORDS")):
        tone = 0.3 * np.sin(np.arange(8000) * (0.2 + 0.1 * number))
        soundfile.write(tmp_path / f"{number}.wav", np.concatenate([np.zeros(4000), tone, np.zeros(4000)]), 16_000)
        lines.append(f"{number}.wav\t{word}")
    (tmp_path / "words.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "words.tsv"


def test_words_are_joined_where_they_are_said_to_be(manifest):
    utterances = word_times.join_words(read_recordings(manifest), 3)
    assert len(utterances) == 3
    for samples, spoken in utterances:
        assert {word.word for word in spoken} <= {"ONE", "TWO"}  # only recordings of one word
        assert len(spoken) == word_times.WORDS_PER_UTTERANCE
        loud = np.abs(samples) > 0.05
        told = np.zeros(len(loud), bool)
        for word in spoken:
            assert word.end - word.start == pytest.approx(0.5, abs=0.011)
            told[round(word.start * 16_000) : round(word.end * 16_000)] = True
        assert not (loud & ~told).any()
        assert told.mean() == pytest.approx(5 * 0.5 * 16_000 / len(told), abs=0.01)


def test_errors_are_those_of_the_words_that_were_recognised():
    def timed(*words):
        return [WordResult(word=word, start=start, end=end, confidence=None) for word, start, end in words]

    class FakeRecognizer:
        def transcribe(self, samples, options):
            recognized = timed(("ONE", 0.11, 0.48), ("SIX", 0.6, 0.9), ("TWO", 1.03, 1.5))
            return Transcript(text="", duration=2.0, segments=[Result(text="", is_final=True, words=recognized)])

    spoken = timed(("one", 0.1, 0.5), ("five", 0.6, 0.9), ("two", 1, 1.5))
    found = word_times.compare(FakeRecognizer(), [(np.zeros(9, np.float32), spoken)], DecodingOptions())
    assert (found["num_words"], found["num_recognised"]) == (3, 2)
    assert found["start"] == {"bias_ms": 20.0, "mean_ms": 20.0, "median_ms": 20.0, "p90_ms": 28.0}
    assert found["end"] == {"bias_ms": -10.0, "mean_ms": 10.0, "median_ms": 10.0, "p90_ms": 18.0}
    assert word_times.statistics([]) is None


@pytest.mark.slow
def test_the_report_of_the_command(bundle, manifest, tmp_path, capsys):
    file = tmp_path / "word_times.json"
    word_times.main([str(bundle.path), str(manifest), "--utterances", "2", "--results", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    assert set(results["sets"]["words"]) == {"full", "chunk 16"}
    assert results["sets"]["words"]["full"]["num_words"] == 10
    assert word_times.values(results)["table"] in capsys.readouterr().out
