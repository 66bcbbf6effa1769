"""The studies of words, their times and confidences, hotwords and ends of turns."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from feeding import RATE

from u2moe.benchmarks.instruments.statistics import NUM_DRAWN, ratio_of_sums
from u2moe.benchmarks.studies import calibration, formats, hotwords, turn, word_times
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.quantize.recipes import recipe
from u2moe.runtime import Bundle, DecodingOptions, EndpointConfig, Recognizer, Result, Transcript, WordResult
from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.rescoring import word_confidence
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary


def test_confidences_that_are_honest_or_equally_sure_and_their_fit():
    confidences, drawn = np.random.default_rng(0).random((2, 20_000))
    right = drawn < confidences
    found = calibration.reliability((confidences, right))
    assert (found["num_words"], found["right"]) == (20_000, pytest.approx(0.5, abs=0.02))
    assert found["expected_error"] < 0.02
    assert (len(found["bins"]), sum(item["num_words"] for item in found["bins"])) == (10, 20_000)
    for item in found["bins"]:
        assert item["from"] <= item["confidence"] <= item["to"]
        assert item["right"] == pytest.approx(item["confidence"], abs=0.04)
    assert found["area"] == pytest.approx(5 / 6, abs=0.01)  # by integration
    squared = calibration.reliability((confidences, drawn < confidences**2))
    assert squared["expected_error"] == pytest.approx(1 / 6, abs=0.01)  # mean of x - x²
    assert calibration.area_under_roc((np.full(9, 0.5), np.arange(9) % 2 == 0)) == 0.5
    assert calibration.area_under_roc((np.full(3, 0.5), np.ones(3, bool))) is None
    assert calibration.reliability((np.zeros(0), np.zeros(0, bool)))["bins"] == []
    found = calibration.fit((1 / (1 + np.exp(-(np.log(confidences / (1 - confidences)) + 1) / 2)), right))
    assert found == (pytest.approx(2, abs=0.1), pytest.approx(-1, abs=0.1))
    scale, _ = calibration.fit((np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])))
    assert 0 < scale < 10  # the search ends when all are separated


@pytest.mark.slow
def test_confidences_are_reported_and_fitted(bundle, recognizer, sound, tmp_path, capsys, study, listed):
    """All words are correct, except the one with the lowest confidence. A fit is on top of what the bundle says."""
    recognized = [word for segment in recognizer.transcribe(sound, 16_000).segments for word in segment.words]
    wrong = min(recognized, key=lambda word: word.confidence)
    test = listed("test.tsv", " ".join(word.word for word in recognized if word is not wrong))
    sets = study(calibration, bundle.path, test)["sets"]
    assert sets["test"] == sets["all"]
    assert sets["test"]["num_words"] == len(recognized) > 1
    assert (sets["test"]["right"], sets["test"]["area"]) == (pytest.approx(1 - 1 / len(recognized), abs=1e-4), 1.0)
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    calibration.main([str(folder), str(test), "--fit"])
    written = Bundle.open(folder).manifest.calibration
    assert f"scale {written.scale}, bias {written.bias}" in capsys.readouterr().out
    both = calibration.write_calibration(folder, 3.0, 0.25)
    expected = word_confidence([word_confidence([0.3], written)], Calibration(scale=3.0, bias=0.25))
    assert word_confidence([0.3], both) == pytest.approx(expected)
    with pytest.raises(ValueError, match="scale must be a number above 0"):
        calibration.write_calibration(folder, -1.0, 0.0)
    assert Bundle.open(folder).manifest == dataclasses.replace(bundle.manifest, calibration=both)
    assert {file.name for file in folder.iterdir()} == {file.name for file in bundle.path.iterdir()}


def test_the_interval_of_a_ratio_is_as_wide_as_recordings_differ():
    mixed = ratio_of_sums(np.tile([2, 4], 200), np.full(400, 2))  # 1.5, with a standard error of 0.5 / 20
    assert (mixed.median, mixed.count) == (1.5, NUM_DRAWN)
    assert mixed.high - mixed.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    errors = np.arange(1, 200)
    found = ratio_of_sums(2 * errors, errors)  # both use the same drawn recordings
    assert (found.low, found.high) == (2, 2)
    with pytest.raises(ValueError, match="the values of the reference sum to 0"):
        ratio_of_sums(np.array([1]), np.array([0]))


def test_noise_is_within_half_a_step_of_16_bits(listed):
    given = []
    features = SimpleNamespace(sample_rate=16000)
    recognizer = SimpleNamespace(
        transcribe=lambda samples, options: given.append(samples) or SimpleNamespace(text=""),
        bundle=SimpleNamespace(manifest=SimpleNamespace(features=features)),
    )
    for variant in map(formats.Variant.parse, ("bundle@native", "bundle@native+noise")):
        assert (variant.folder.name, variant.kernels) == ("bundle", "native")
        formats.recognized(recognizer, read_recordings(listed("a.tsv", "")), noise=variant.noise)
    assert 0.9 * formats.HALF_STEP < np.abs(given[-1] - given[0]).max() < 1.01 * formats.HALF_STEP


@pytest.mark.slow
def test_variants_are_compared_on_the_same_recordings(bundle, tmp_path, study, listed):
    quantize_bundle(bundle.path, tmp_path / "int8", recipe("int8"))
    folders = {"float32": bundle.path, "again": bundle.path, "int8": tmp_path / "int8"}
    variants = [f"{name}={folder}@onnxruntime" for name, folder in folders.items()]
    results = study(formats, *variants, "--list", listed("words.tsv", "A B", "C"), listed("more.tsv", "D"))
    assert (results["num_recordings"], results["num_words"]) == (3, {"words": 3, "more": 1})
    float32, same, int8 = (results["variants"][name]["modes"]["full context"] for name in folders)
    equal = {"median": 1, "low": 1, "high": 1, "count": NUM_DRAWN}
    assert same["beside"]["float32"] == {"cost": equal, "num_other_texts": 0, "num_other_words": 0}
    assert set(int8["beside"]) == {"float32", "again"}
    shown = formats.values(results)
    assert (shown["recordings"], shown["words"], shown["again.full.float32.texts"]) == ("3", "4", "0%")
    cost, texts = formats.targets(results)
    errors, others = (sum(own["num_errors"].values()) for own in (int8, float32))
    assert (cost.found, cost.limit) == (pytest.approx(100 * (errors / others - 1)), 0.3)
    assert (texts.found, texts.limit) == (pytest.approx(100 * int8["beside"]["float32"]["num_other_texts"] / 3), 7.5)
    assert results["variants"]["int8"]["bytes"] < 0.6 * results["variants"]["float32"]["bytes"]


TEXTS = ("THE OLD HARBOUR LIES THERE", "THE OLD KITCHEN LIES THERE", "GARDEN HARBOUR KITCHEN", *["THERE"] * 3)
RECORDINGS = [Recording(path=str(number), transcript=text) for number, text in enumerate(TEXTS)]


class Hearer:
    """A fake recogniser that hears only "OLD" and the hotwords in `hears`."""

    vocabulary = Vocabulary(["<blank>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], TextConfig())

    def __init__(self, hears):
        self.hears = hears

    def transcribe(self, path, *, hotwords=None, grammar=None):
        if grammar or isinstance(hotwords, list):
            return Transcript(text=grammar.lines[0] if grammar else hotwords[0], duration=1800.0, segments=[])
        said, chosen = TEXTS[int(path)].split(), hotwords.hotwords if hotwords else ()
        named = [word for word, weight in chosen if self.hears(word, said) and weight == 1.25]
        return Transcript(text=" ".join(["OLD", *named]), duration=1.0, segments=[])


def test_names_are_counted_where_they_are_said_and_others_never_are():
    assert hotwords.rare_words(RECORDINGS)[:3] == [{"HARBOUR"}, {"KITCHEN"}, {"GARDEN", "HARBOUR", "KITCHEN"}]
    present, absent = (
        hotwords.measure(Hearer(hears), RECORDINGS, 1.25, hotwords.lists_of_each(RECORDINGS, 100))
        for hears in (lambda word, said: word in said, lambda word, said: word not in said)
    )
    assert (present["without"]["num_rare"], present["without"]["num_rare_found"]) == (5, 0)
    assert (present["with"]["num_rare_found"], present["with"]["num_false"]) == (5, 0)
    assert (present["unrelated"]["num_false"], present["num_changed_by_unrelated"]) == (0, 0)
    assert present["with"]["num_errors"] < present["without"]["num_errors"] == present["unrelated"]["num_errors"]
    assert absent["with"]["num_rare_found"] == 0
    assert absent["num_changed_by_unrelated"] == 5  # the third has no others
    assert absent["unrelated"]["num_false"] == 2 + 2 + 3 * 3
    assert absent["unrelated"]["num_errors"] > absent["without"]["num_errors"]
    chosen = [f"WORD{number}" for number in range(300)]
    own = hotwords.others(chosen, {"WORD1", "WORD2"}, 100, np.random.default_rng(0))
    assert len(set(own) - {"WORD1", "WORD2"}) == len(own) == 100


def test_long_lists_are_the_same_for_all_recordings_and_noise_as_loud_as_babble(tmp_path, sound, monkeypatch):
    lists = hotwords.lists_of_all(RECORDINGS, 5, ["there", "window", "candle", "it", "<unk>", "ladder"])
    assert lists["with"] == ["GARDEN", "HARBOUR", "KITCHEN", *lists["unrelated"][:2]]
    assert sorted(lists["unrelated"]) == ["CANDLE", "LADDER", "WINDOW"]
    found = hotwords.measure(Hearer(lambda word, said: word in said), RECORDINGS, 1.25, lists)
    assert (found["num_listed"], found["with"]["num_rare_found"], found["with"]["num_false"]) == (5, 5, 0)
    assert found["times"] > 0
    soundfile.write(tmp_path / "a.wav", np.tile(sound, 5), 16_000)
    made = hotwords.noises([Recording(path=tmp_path / "a.wav", transcript="")])
    assert {kind: len(own) for kind, own in made.items()} == {"noise": 24, "babble": 24}
    every = [each for own in made.values() for each in own]
    assert {(round(float(each.std()), 3), len(each)) for each in every} == {(0.05, 15 * hotwords.RATE)}

    def peak(*arguments):
        *_, option, last = arguments
        return len(last.read_text(encoding="utf-8").split()) * 10**6 if option == "--hotwords" else 0

    monkeypatch.setattr(hotwords, "peak_memory", peak)
    found = hotwords.measure_memory(tmp_path, RECORDINGS[0], [f"W{number}" for number in range(20_000)])
    assert found == {"0": 0, "1000": 10**9, "10000": 10**10}
    assert "| 10,000 | 10000 |" in hotwords.values({"memory": {"peaks": found}})["memory"]


def test_hotwords_are_measured_with_a_weight_and_commands_counted_in_each_condition(bundle, study, listed):
    """The second recogniser hears "OLD" without commands, and the first command with them."""
    results = study(hotwords, bundle.path, listed("test.tsv", "".join(bundle.tokens[3:9])), "--weight", 9)
    assert results["weight"] == 9
    assert {length: found["num_recordings"] for length, found in results["sets"]["test"].items()} == {"10": 1, "100": 1}
    said = [(recording.path, recording.transcript) for recording in RECORDINGS[:2]]
    found = hotwords.measure_commands(Hearer(lambda *_: False), RECORDINGS[2:], {"speech": said})
    assert (found["num_groups"], found["hours"]) == (1, {"speech": 1.0})
    conditions = ("without", "hotwords", "grammar", "with_rest")
    without, others, grammar, with_rest = (found["conditions"][name] for name in conditions)
    assert without == {"num_errors": 4, "speech": 0}
    assert grammar["num_errors"] == others["num_errors"] in (1, 3)
    assert with_rest["speech"] == 2 * (grammar["num_errors"] == 3)


def test_utterances_follow_each_other_with_pauses():
    demo, clip = Recognizer.from_pretrained(), DEMO_FOLDER / "clips" / "question.flac"
    recording = Recording(path=clip, transcript="WHAT DO YOU WANT TO KNOW")
    samples, end = turn.with_pause(demo, recording, np.random.default_rng(0))
    assert end + turn.SILENCE_S == pytest.approx(len(samples) / RATE, abs=1e-3)
    assert turn.with_pause(demo, Recording(path=clip, transcript="WHAT DO YOU"), np.random.default_rng(0)) is None
    fusion = Fusion(demo.language_model, demo.vocabulary)
    found = turn.measure(demo, [recording], fusion)
    assert {name: each["num_sentences"] for name, each in found.items()} == dict.fromkeys(turn.rules(), 1)
    assert found["silence of 0.6 s"]["p50"] < found["silence of 1.2 s"]["p50"]
    silent = np.full((60, len(demo.vocabulary)), -9.0, np.float32)
    silent[:, 0] = -0.01
    assert turn.endpoints(demo, silent, EndpointConfig(), fusion) == [2.4]
    assert turn.endpoints(demo, np.tile(silent, (2, 1)), EndpointConfig(), fusion) == pytest.approx([2.4, 4.8, 7.2])


@pytest.mark.slow
def test_words_are_joined_where_they_are_said_to_be_and_their_times_measured(bundle, tmp_path, study):
    """The recordings have a tone of half a second, which begins after a quarter of a second."""
    quiet, spoken, manifest = np.zeros(4000), {"ONE": 0.2, "TWO": 0.3, "TWO WORDS": 0.4}, tmp_path / "words.tsv"
    for word, pitch in spoken.items():
        samples = np.concatenate([quiet, 0.3 * np.sin(np.arange(8000) * pitch), quiet])
        soundfile.write(tmp_path / f"{word}.wav", samples, 16_000)
    manifest.write_text("".join(f"{word}.wav\t{word}\n" for word in spoken), encoding="utf-8")
    utterances = word_times.join_words(read_recordings(manifest), 3)
    assert len(utterances) == 3
    for samples, spoken in utterances:
        assert {word.word for word in spoken} <= {"ONE", "TWO"}  # only recordings of one word
        assert len(spoken) == word_times.WORDS_PER_UTTERANCE
        told = np.zeros(len(samples), bool)
        for word in spoken:
            assert word.end - word.start == pytest.approx(0.5, abs=0.011)
            told[round(word.start * 16_000) : round(word.end * 16_000)] = True
        assert np.abs(samples[~told]).max() <= 0.05
        assert told.mean() == pytest.approx(5 * 0.5 * 16_000 / len(told), abs=0.01)
    found = study(word_times, bundle.path, manifest, "--utterances", 2)["sets"]["words"]
    assert {context: own["num_words"] for context, own in found.items()} == {"full": 10, "chunk 16": 10}


def test_errors_of_times_are_those_of_the_words_that_were_recognised():
    def timed(*words):
        return [WordResult(word=word, start=start, end=end, confidence=None) for word, start, end in words]

    recognized = timed(("ONE", 0.11, 0.48), ("SIX", 0.6, 0.9), ("TWO", 1.03, 1.5))
    found = Transcript(text="", duration=2.0, segments=[Result(text="", is_final=True, words=recognized)])
    spoken = timed(("one", 0.1, 0.5), ("five", 0.6, 0.9), ("two", 1, 1.5))
    recognizer = SimpleNamespace(transcribe=lambda samples, options: found)
    found = word_times.compare(recognizer, [(np.zeros(9, np.float32), spoken)], DecodingOptions())
    start = {"bias_ms": 20.0, "mean_ms": 20.0, "median_ms": 20.0, "p90_ms": 28.0}
    end = {"bias_ms": -10.0, "mean_ms": 10.0, "median_ms": 10.0, "p90_ms": 18.0}
    assert found == {"num_words": 3, "num_recognised": 2, "start": start, "end": end}
    assert word_times.statistics([]) is None
