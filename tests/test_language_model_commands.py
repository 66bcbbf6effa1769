"""Language models of recognisers, streams and the server; `u2moe lm`: training, converting, tuning and attaching."""

import dataclasses
import errno
import gc
import pickle
import weakref
from pathlib import Path

import pytest
from feeding import CHUNKED, feed, feed_together
from language_models import random_arpa
from tones import SYMBOLS, say

from u2moe.runtime import (
    Bundle,
    DecodingOptions,
    LanguageModel,
    LanguageModelError,
    LanguageModelOptions,
    Recognizer,
    cli,
)
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli.options import language_model_options
from u2moe.runtime.decoding.ctc import penalize_blank
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.language_model_weights import FIRST_GRID, SECOND_GRID, EncodedRecordings, tune
from u2moe.runtime.language.sentences import TextOptions, read_sentences, sentences_of


@pytest.fixture
def arpa(tmp_path):
    """Return the file of a small model."""
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCDEFX", 2), encoding="utf-8")
    return tmp_path / "toy.arpa"


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


def test_a_text_becomes_a_model_and_one_that_cannot_be_written_leaves_the_earlier(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("The cat sat. The cat ran.\nA dog ran!\n" * 3, encoding="utf-8")
    assert lm("train", tmp_path / "text.txt", "-o", tmp_path / "a.arpa", "--order", 2) == 0
    err = capsys.readouterr().err
    assert "9 sentences, 36 words" in err  # including the ends of sentences
    assert "8 1-grams" in err.splitlines()[-1] or "9 1-grams" in err.splitlines()[-1]
    assert lm("train", tmp_path / "text.txt", "-o", tmp_path / "a.lm", "--order", 2) == 0
    assert lm("build", tmp_path / "a.lm", "-o", tmp_path / "b.arpa.gz") == 0
    models = [LanguageModel.open(tmp_path / name) for name in ("a.arpa", "a.lm", "b.arpa.gz")]
    for model in models:
        assert set(model.ngrams.words) == {"the", "cat", "sat", "ran", "a", "dog", "<s>", "</s>", "<unk>"}
        assert model.ngrams.log_prob == pytest.approx(models[0].ngrams.log_prob, abs=1e-6)
    assert len(before := (tmp_path / "a.lm").read_bytes()) < (tmp_path / "a.arpa").stat().st_size

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert lm("train", tmp_path / "text.txt", "-o", tmp_path / "a.lm") == 1
    assert capsys.readouterr().err.endswith("a.lm: cannot be written: No space left on device\n")
    assert (tmp_path / "a.lm").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.arpa", "a.lm", "b.arpa.gz", "text.txt"]


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


@pytest.fixture
def recordings(bundle, model, sound):
    """Make three recordings. Their transcripts are the tiny model's results, with changes."""
    encoded = EncodedRecordings(bundle, model, dataclasses.replace(bundle.manifest.decoding, beam_size=4))
    for start in range(3):
        encoded.add("", sound[start * 8000 : 40_000 + start * 8000])
    for recording, text in zip(encoded.recordings, encoded.texts(None, second_pass=False), strict=True):
        recording.transcript = text[1:] + " X"
    return encoded


def test_tuning_finds_the_best_of_its_grid(recordings, arpa):
    start = LanguageModelOptions(model=arpa)
    told = []
    grid = {"weight": (0.0, 0.5, 3.0), "word_bonus": (-1.0, 0.0)}
    best, decoding, trials = tune(recordings, start, second_pass=True, grid=grid, on_trial=told.append)
    assert (decoding, told, trials[0].weights) == (recordings.decoding, trials, {})
    assert trials[0].num_errors == recordings.word_errors(None, second_pass=True).num_errors
    fewest = min(trial.num_errors for trial in trials[1:])
    assert recordings.word_errors(best, second_pass=True).num_errors == fewest
    assert len({tuple(trial.weights.values()) for trial in trials}) == len(trials)


def test_the_penalty_of_the_blank_is_tuned_with_and_without_a_model(recordings, model, monkeypatch, arpa):
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
    start = LanguageModelOptions(model=arpa, weight=3.0, word_bonus=0.0, rescoring_weight=0.0)
    best, decoding, _ = tune(recordings, start, second_pass=False, grid=grid)
    assert (best.weight, decoding.blank_penalty) == (0.0, 8.0)


@pytest.mark.slow
def test_recordings_that_are_encoded_once_give_what_a_recogniser_gives(recordings, recognizer, sound, arpa):
    model = LanguageModelOptions(model=arpa, weight=1.0)
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
def test_the_command_tunes_on_a_list(bundle, clips, capsys, arpa):
    (clips / "dev.tsv").write_text("a.wav\tA B\nmissing.wav\tA\n", encoding="utf-8-sig")  # as Notepad writes it
    assert lm("tune", clips / "dev.tsv", "--lm", arpa, "--model", bundle.path) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"--lm {arpa},weight=")
    found = language_model_options(out.split()[1])
    assert found.weight in FIRST_GRID["weight"]
    assert found.rescoring_weight in SECOND_GRID["rescoring_weight"]
    assert "missing.wav" in err
    assert "no language model" in err
    assert "second pass" in err


@pytest.fixture
def options(tmp_path):
    """Return a function from log-probabilities of words to options with that model."""

    def options(*, weight=1.0, **log_probs):
        words = {"<unk>": -9, "</s>": -1, **log_probs}
        lines = "\n".join(f"{log_prob}\t{word}" for word, log_prob in words.items())
        path = tmp_path / "words.arpa"
        path.write_text(f"\\data\\\nngram 1={len(words)}\n\n\\1-grams:\n{lines}\n\n\\end\\\n", encoding="utf-8")
        return LanguageModelOptions(model=path, weight=weight, word_bonus=0)

    return options


def with_model(language_model):
    return dataclasses.replace(CHUNKED, language_model=language_model)


def test_streams_that_are_decoded_together_keep_their_own_models(toy, options):
    models = [None, options(A=-0.1, B=-30, C=-1, D=-1), options(A=-30, B=-0.1, C=-1, D=-1), None]
    samples, _ = say("ABCDBA", [0.3] * 6)
    chosen = [with_model(model) for model in models]
    alone = [feed(toy, samples, options=item) for item in chosen]
    assert feed_together(toy, [samples] * 4, chosen) == alone
    texts = [" ".join(segment.text for segment in segments) for segments in alone]
    assert texts[0] == texts[3] == "A B C D B A"
    assert "B" not in texts[1].split()
    assert "A" not in texts[2].split()


def test_a_model_that_counts_for_nothing_changes_no_text_and_no_score(toy, options):
    samples, _ = say("ABCD", [0.3] * 4)
    plain = feed(toy, samples)
    weightless = feed(toy, samples, options=with_model(options(weight=0, A=-1)))
    for segment, other in zip(plain, weightless, strict=True):
        for alternative in other.nbest:
            assert alternative.language_score == 0
        assert [dataclasses.replace(item, language_score=None) for item in other.nbest] == segment.nbest
        assert dataclasses.replace(other, nbest=segment.nbest) == segment


def test_a_recogniser_shares_its_model_and_forgets_those_of_streams(toy, options):
    recognizer = Recognizer(toy.bundle, toy.model, with_model(options(A=-1, B=-1)))
    first, second = recognizer.create_stream(), recognizer.create_stream()
    assert first.state.fusion is second.state.fusion is not None
    own = options(A=-2)
    stream = recognizer.create_stream(with_model(own))
    assert stream.state.fusion is not first.state.fusion
    gone = weakref.ref(own)
    del own, stream
    gc.collect()
    assert gone() is None


def test_a_search_that_cannot_use_a_model_says_so_and_the_demo_has_a_general_one(options):
    for search in ("ctc_greedy", "attention"):
        with pytest.raises(ValueError, match=f"search is '{search}'"):
            DecodingOptions(search=search, language_model=options(A=-1))
    with pytest.raises(ValueError, match="must be LanguageModelOptions"):
        DecodingOptions(language_model="words.arpa")
    bundle = Bundle.open(DEMO_FOLDER)
    options = bundle.language_model()
    assert bundle.manifest.files["language.lm"].size <= 2_000_000
    assert options.model.ngrams.order == 3
    expected = dataclasses.replace(options, weight=0.1)
    assert language_model_options("demo,weight=0.1").digest == expected.digest != options.digest
    assert language_model_options("demo,weight=0.2,weight=0.1,level=word").level == "word"


def test_options_reach_worker_processes_and_wrong_settings_are_named(toy, arpa, clips):
    options = LanguageModelOptions(model=LanguageModel.open(arpa), weight=0.25)
    copied = pickle.loads(pickle.dumps(options))
    tokens = [1, 2, SYMBOLS.index("\u2581D"), 3]
    assert Fusion(copied, toy.vocabulary).score(tokens) == Fusion(options, toy.vocabulary).score(tokens) != 0
    (clips / "names.txt").write_text("ANNA\nBOB\n", encoding="utf-8")
    named = language_model_options(f"{arpa},weight=0.3,A={clips / 'names.txt'}")
    assert (named.weight, named.classes) == (0.3, {"A": ("ANNA", "BOB")})
    for text, message in (
        ("demo,weight=x", "--lm: weight must be a number, got 'x'"),
        ("demo,wait=0.3", r"--lm: found wait=0.3, expected a setting \(weight, .*\) or WORD=FILE: .*No such file"),
        ("demo,weight=-1", "weight must be"),
        (str(clips / "a.wav"), "a.wav: cannot be read as an ARPA file"),
        ("demo,level=letter", "level must be"),
    ):
        with pytest.raises((ValueError, LanguageModelError), match=message):
            language_model_options(text)


def test_a_server_uses_one_model_for_all_streams_and_files(bundle, arpa):
    pytest.importorskip("starlette", reason="needs the extra server")
    from u2moe.runtime.server.log import Metrics  # noqa: PLC0415
    from u2moe.runtime.server.options import ServerOptions  # noqa: PLC0415
    from u2moe.runtime.server.service import Service  # noqa: PLC0415

    language_model = LanguageModelOptions(model=arpa)
    recognizer = Recognizer.load(bundle.path, options=DecodingOptions(language_model=language_model))
    options = Service({"toy": recognizer}, ServerOptions(), Metrics()).default.stream_options
    streams = [recognizer.create_stream(options) for _ in range(2)]
    assert recognizer.options.language_model is options.language_model is language_model
    assert streams[0].state.fusion is streams[1].state.fusion is not None
