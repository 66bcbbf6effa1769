"""`u2moe lm`: training, converting, tuning and attaching models."""

import dataclasses
import errno
from pathlib import Path

import pytest
from language_models import random_arpa

from u2moe.runtime import LanguageModel, LanguageModelError, LanguageModelOptions, cli
from u2moe.runtime.cli.options import language_model_options
from u2moe.runtime.decoding.ctc import penalize_blank
from u2moe.runtime.decoding.language_model_weights import FIRST_GRID, SECOND_GRID, EncodedRecordings, tune
from u2moe.runtime.language.sentences import TextOptions, read_sentences, sentences_of


def lm(*arguments):
    return cli.main(["lm", *map(str, arguments)])


@pytest.mark.parametrize(("text", "expected"), [
    ("Hello, World! It's 5 o'clock.", [["hello", "world"], ["it's", "<unk>", "o'clock"]]),
    ("Call <name> now", [["call", "<name>", "now"]]),
    ("well-known \u201cquoted\u201d don\u2019t", [["well", "known", "quoted", "don't"]]),
    ("version 3.14 of it", [["version", "<unk>", "<unk>", "of", "it"]]),
    ("\u4f60\u597d\u3002\u4e16\u754c", [["\u4f60", "\u597d"], ["\u4e16", "\u754c"]]),
    ("  ... 12 34 !", []),
    ("the dogs' bone", [["the", "dogs'", "bone"]]),
    ("a 'big' house, \u2018nice\u2019", [["a", "big", "house", "nice"]]),
    ("'the dogs' bone'", [["the", "dogs", "bone'"]]),  # either apostrophe could end the quotation
    (
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
        [["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092d\u093e\u0937\u093e"]],
    ),
    ("nai\u0308ve", [["na\u00efve"]]),
])  # fmt: skip
def test_text_as_people_write_it(text, expected):
    assert list(sentences_of(text)) == expected


def test_text_is_kept_as_it_is_on_request(tmp_path):
    (tmp_path / "a.txt").write_text("\u2581THE CAT.\n\nDog\n", encoding="utf-8")
    assert list(read_sentences([tmp_path / "a.txt"], TextOptions(raw=True))) == [["\u2581THE", "CAT."], ["Dog"]]
    assert list(read_sentences([tmp_path / "a.txt"], TextOptions(keep_case=True)))[-1] == ["Dog"]
    (tmp_path / "marked.txt").write_text("THE CAT.", encoding="utf-8-sig")  # as Notepad writes it
    assert list(read_sentences([tmp_path / "marked.txt"], TextOptions(raw=True))) == [["THE", "CAT."]]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(LanguageModelError, match=r"b\.txt"):
        list(read_sentences([tmp_path / "b.txt"]))


def test_a_text_becomes_a_model(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The cat sat. The cat ran.\nA dog ran!\n" * 3, encoding="utf-8")
    assert lm("train", tmp_path / "text.txt", "-o", tmp_path / "a.arpa", "--order", 2) == 0
    err = capsys.readouterr().err
    assert "9 sentences, 36 words" in err  # including the ends of sentences
    assert "8 1-grams" in err.splitlines()[-1] or "9 1-grams" in err.splitlines()[-1]
    assert lm("train", tmp_path / "text.txt", "-o", tmp_path / "a.lm", "--order", 2) == 0
    assert lm("build", tmp_path / "a.lm", "-o", tmp_path / "b.arpa.gz") == 0
    words = {*["the", "cat", "sat", "ran", "a", "dog", "<s>", "</s>", "<unk>"]}
    models = [LanguageModel.open(tmp_path / name) for name in ("a.arpa", "a.lm", "b.arpa.gz")]
    for model in models:
        assert set(model.ngrams.words) == words
        assert model.ngrams.log_prob == pytest.approx(models[0].ngrams.log_prob, abs=1e-6)
    assert (tmp_path / "a.lm").stat().st_size < (tmp_path / "a.arpa").stat().st_size


def test_faults_of_the_commands_are_one_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a b", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    for arguments in (
        ("train", tmp_path / "missing.txt", "-o", tmp_path / "x.lm"),
        ("train", tmp_path / "empty.txt", "-o", tmp_path / "x.lm"),
        ("train", tmp_path / "text.txt", "-o", tmp_path / "x.lm", "--order", 6),
        ("train", tmp_path / "text.txt", "-o", tmp_path / "x.lm", "--prune", 1),
        ("train", tmp_path / "text.txt", "-o", tmp_path / "no" / "x.lm"),
        ("build", tmp_path / "text.txt", "-o", tmp_path / "x.lm"),
        ("train", tmp_path / "text.txt", "-o", tmp_path / "x.gz"),
    ):
        assert lm(*arguments) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("u2moe: error: ")


def test_a_model_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch, capsys):
    text, other, model = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "a.lm"
    text.write_text("a b", encoding="utf-8")
    other.write_text("c", encoding="utf-8")
    assert lm("train", text, "-o", model) == 0
    before = model.read_bytes()

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert lm("train", other, "-o", model) == 1
    assert capsys.readouterr().err.endswith(f"u2moe: error: {model}: cannot be written: No space left on device\n")
    assert model.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "other.txt", "a.lm"}


@pytest.fixture
def recordings(bundle, model, sound):
    """Make three recordings. Their transcripts are the tiny model's results, with changes."""
    encoded = EncodedRecordings(bundle, model, dataclasses.replace(bundle.manifest.decoding, beam_size=4))
    for start in range(3):
        encoded.add("", sound[start * 8000 : 40_000 + start * 8000])
    for recording, text in zip(encoded.recordings, encoded.texts(None, second_pass=False), strict=True):
        recording.transcript = text[1:] + " X"
    return encoded


def test_tuning_finds_the_best_of_its_grid(recordings, tmp_path):
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCDEFX", 2), encoding="utf-8")
    start = LanguageModelOptions(model=tmp_path / "toy.arpa")
    told = []
    grid = {"weight": (0.0, 0.5, 3.0), "word_bonus": (-1.0, 0.0)}
    best, decoding, trials = tune(recordings, start, second_pass=True, grid=grid, on_trial=told.append)
    assert decoding == recordings.decoding
    assert told == trials
    assert trials[0].weights == {}
    assert trials[0].num_errors == recordings.word_errors(None, second_pass=True).num_errors
    fewest = min(trial.num_errors for trial in trials[1:])
    assert recordings.word_errors(best, second_pass=True).num_errors == fewest
    assert len({tuple(trial.weights.values()) for trial in trials}) == len(trials)


def test_the_penalty_of_the_blank_is_tuned_with_and_without_a_model(recordings, model, monkeypatch, tmp_path):
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCDEFX", 2), encoding="utf-8")
    ctc, outputs = model.ctc, [recording.encoder_out for recording in recordings.recordings]
    monkeypatch.setattr(model, "ctc", lambda output: penalize_blank(ctc(output), -8.0))  # recognises mostly silence
    recordings.recordings.clear()
    for output in outputs:
        recordings.add_encoded("", output)
    wanted = dataclasses.replace(recordings.decoding, blank_penalty=8.0)
    for recording, text in zip(recordings.recordings, recordings.texts(None, wanted, second_pass=False), strict=True):
        recording.transcript = text
    grid = {"weight": (0.0, 3.0), "blank_penalty": (0.0, 8.0)}
    best, decoding, trials = tune(recordings, None, second_pass=False, grid=grid)
    assert best is None
    assert decoding == wanted
    assert [trial.weights for trial in trials] == [{}, {"blank_penalty": 0.0}, {"blank_penalty": 8.0}]
    assert trials[-1].num_errors == 0 < trials[0].num_errors
    start = LanguageModelOptions(model=tmp_path / "toy.arpa", weight=3.0, word_bonus=0.0, rescoring_weight=0.0)
    best, decoding, _ = tune(recordings, start, second_pass=False, grid=grid)
    assert (best.weight, decoding.blank_penalty) == (0.0, 8.0)


@pytest.mark.slow
def test_recordings_that_are_encoded_once_give_what_a_recogniser_gives(recordings, recognizer, sound, tmp_path):
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCDEFX", 2), encoding="utf-8")
    model = LanguageModelOptions(model=tmp_path / "toy.arpa", weight=1.0)
    for options, penalty in ((None, 0.0), (model, 0.0), (None, 1.5), (model, 8.0)):
        decoding = dataclasses.replace(recordings.decoding, blank_penalty=penalty)
        for number, text in enumerate(recordings.texts(options, decoding, second_pass=True)):
            chosen = {"beam_size": 4, "language_model": options, "blank_penalty": penalty}
            stream = recognizer._stream(recognizer.options.__class__(**chosen), None, None)
            stream.accept_waveform(16_000, sound[number * 8000 : 40_000 + number * 8000])
            stream.input_finished()
            recognizer.decode_streams([stream])
            assert stream.get_result().text == text


@pytest.mark.slow
def test_the_command_tunes_on_a_list(bundle, clips, capsys, tmp_path):
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCDEFX", 2), encoding="utf-8")
    (clips / "dev.tsv").write_text("a.wav\tA B\nmissing.wav\tA\n", encoding="utf-8-sig")  # as Notepad writes it
    assert lm("tune", clips / "dev.tsv", "--lm", tmp_path / "toy.arpa", "--model", bundle.path) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"--lm {tmp_path / 'toy.arpa'},weight=")
    found = language_model_options(out.split()[1])
    assert found.weight in FIRST_GRID["weight"]
    assert found.rescoring_weight in SECOND_GRID["rescoring_weight"]
    assert "missing.wav" in err
    assert "no language model" in err
    assert "second pass" in err
