"""Language models of recognisers, streams and the server; `u2moe lm`; training, compared with results of lmplz."""

import dataclasses
import errno
import gc
import itertools
import math
import pickle
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from feeding import CHUNKED, feed, feed_together
from hypothesis import given
from hypothesis import strategies as st
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
from u2moe.runtime.language.files import read_arpa
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train
from u2moe.runtime.language.ngrams import LN10
from u2moe.runtime.language.sentences import TextOptions, read_sentences, sentences_of


@pytest.fixture
def arpa(tmp_path):
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
    assert "9 1-grams" in err.splitlines()[-1]
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


def test_faults_of_the_commands_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a b", encoding="utf-8")
    Path("empty.txt").write_text("\n", encoding="utf-8")
    faults = ("no.txt", "empty.txt", "a.txt --order 6", "a.txt --prune 1", "a.txt -o no/x.lm", "a.txt -o x.gz")
    for line in ("build a.txt -o x.lm", *(f"train -o x.lm {fault}" for fault in faults)):
        assert lm(*line.split()) == 1
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
    assert lm("tune", clips / "dev.tsv", "--lm", f"{arpa},weight=0.9", "--model", bundle.path) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"--lm {arpa},weight=")
    assert out.count(",weight=") == 1
    found = language_model_options(out.split()[1])
    assert found.weight in (0.9, *FIRST_GRID["weight"])
    assert found.rescoring_weight in SECOND_GRID["rescoring_weight"]
    assert "missing.wav" in err
    assert "no language model" in err
    assert "second pass" in err


@pytest.fixture
def options(tmp_path):
    """Return a function from log-probabilities of words to options with that model."""

    def options(**log_probs):
        words, path = {"<unk>": -9, "</s>": -1, **log_probs}, tmp_path / "words.arpa"
        lines = "\n".join(f"{log_prob}\t{word}" for word, log_prob in words.items())
        path.write_text(f"\\data\\\nngram 1={len(words)}\n\n\\1-grams:\n{lines}\n\n\\end\\\n", encoding="utf-8")
        return LanguageModelOptions(model=path, weight=1.0, word_bonus=0)

    return options


def with_model(language_model):
    return dataclasses.replace(CHUNKED, language_model=language_model)


def test_streams_that_are_decoded_together_keep_their_own_models(toy, options):
    models = [None, options(A=-0.1, B=-30, C=-1, D=-1), options(A=-30, B=-0.1, C=-1, D=-1)]
    models.append(dataclasses.replace(models[1], weight=0))  # counts for nothing
    samples, _ = say("ABCDBA", [0.3] * 6)
    chosen = [with_model(model) for model in models]
    alone = [feed(toy, samples, options=item) for item in chosen]
    assert feed_together(toy, [samples] * 4, chosen) == alone
    texts = [" ".join(segment.text for segment in segments) for segments in alone]
    assert texts[0] == texts[3] == "A B C D B A"
    assert [segment.score for segment in alone[0]] == [segment.score for segment in alone[3]]
    assert "B" not in texts[1].split()
    assert "A" not in texts[2].split()


def test_streams_of_a_recogniser_and_a_server_share_its_model_and_forget_their_own(toy, options):
    pytest.importorskip("starlette", reason="needs the extra server")
    from u2moe.runtime.server.log import Metrics  # noqa: PLC0415
    from u2moe.runtime.server.options import ServerOptions  # noqa: PLC0415
    from u2moe.runtime.server.service import Service  # noqa: PLC0415

    recognizer = Recognizer(toy.bundle, toy.model, with_model(options(A=-1, B=-1)))
    served = Service({"toy": recognizer}, ServerOptions(), Metrics()).default.stream_options
    first, second = recognizer.create_stream(), recognizer.create_stream(served)
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


def probability(ngrams, word, history):
    ids = {text: number for number, text in enumerate(ngrams.words)}
    state = ngrams.begin if history[:1] == ("<s>",) else 0
    for text in history[history[:1] == ("<s>",) :]:
        _, state = ngrams.step(state, ids[text])
    return math.exp(LN10 * ngrams.step(state, ids[word])[0])


sentences = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), min_size=1, max_size=30)


@given(sentences, st.integers(1, 4), st.sampled_from([(0,), (0, 1), (0, 0, 1), (0, 1, 2)]))
def test_probabilities_sum_to_one_and_what_is_rare_is_pruned(text, order, prune):
    prune = prune[:order]
    ngrams = train(count_ngrams(text, order), TrainingOptions(order=order, prune=prune))
    occurrences = Counter()
    for words in (("<s>", *sentence, "</s>") for sentence in text):
        for end in range(2, len(words) + 1):
            occurrences.update(words[begin:end] for begin in range(max(end - order, 0), end))
    kept = Counter(len(n) for n, count in occurrences.items() if count > prune[min(len(n), len(prune)) - 1])
    assert list(ngrams.num_ngrams[1:]) == [kept[length] for length in range(2, order + 1) if kept[length]]
    histories = {(), ("<s>",)} | {n for n in occurrences if len(n) < order and n[-1] != "</s>"}
    for history in itertools.islice(sorted(histories), 12):
        total = sum(probability(ngrams, word, history) for word in ngrams.words if word != "<s>")
        assert total == pytest.approx(1, abs=1e-4)


def test_discounts_of_small_texts_are_those_of_lmplz():
    """They are estimated if something occurs once, twice and three times. Otherwise, they are 0.5, 1 and 1.5."""
    for text, order, expected in (
        (["a"], 2, {("a", ()): 5 / 12, ("a", ("<s>",)): 17 / 24, ("</s>", ("a",)): 17 / 24, ("a", ("a",)): 5 / 24}),
        (["b"] * 2, 1, {("b", ()): 1 / 4 + 1 / 2 / 3}),
        (["c"] * 3, 1, {("c", ()): 1.5 / 6 + 1 / 2 / 3}),
        (["abbccc"], 1, {("a", ()): 0.5 / 7 + 0.9 / 7, ("b", ()): 1.5 / 7 + 0.9 / 7, ("c", ()): 0.9 / 7}),
    ):
        ngrams = train(count_ngrams(text, order), TrainingOptions(order=order))
        assert [probability(ngrams, *case) for case in expected] == pytest.approx(list(expected.values()), rel=1e-4)


def random_text(seed, num_sentences=400):
    """Return a text with frequent word pairs, large enough to estimate discounts."""
    random = np.random.default_rng(seed)
    words = np.array([f"w{number}" for number in range(2000)])
    lengths = random.integers(1, 12, num_sentences)
    return [words[np.minimum(random.zipf(1.4, length), 2000) - 1].tolist() for length in lengths]


def test_the_numbers_are_those_of_lmplz_and_rare_words_unknown():
    """`golden/language_model` contains the results of KenLM's lmplz for this text, with and without pruning."""
    text = random_text(3, 300)
    for name, options in {"all": TrainingOptions(order=3), "pruned": TrainingOptions(order=4, prune=(0, 0, 1))}.items():
        expected = read_arpa(Path(__file__).parent / f"golden/language_model/{name}.arpa.gz")
        found = train(count_ngrams(text, options.order), options)
        assert found.words == expected.words
        assert (found.word == expected.word).all()
        assert (found.first_child == expected.first_child).all()
        assert np.abs(found.log_prob - expected.log_prob).max() < 1e-5
        assert np.abs(found.backoff - expected.backoff).max() < 1e-5
    counts = count_ngrams([["a", "b", "a"], ["c", "a", "b"]], 2, min_word_count=2)
    assert counts.words == ("<unk>", "<s>", "</s>", "a", "b")
    found = {tuple(counts.words[i] for i in row): n for row, n in zip(counts.rows, counts.counts, strict=True)}
    assert found[("<s>", "<unk>")] == found[("<unk>", "a")] == 1
    assert found[("a", "b")] == 2
    assert count_ngrams([["<s>", "a", "</s>"], [], ["<s>"]], 2).rows.tolist() == [[1, 3], [3, 2]]
    assert train(count_ngrams(random_text(2, 20), 3), TrainingOptions(order=3, prune=(0, 10**6))).order == 1


def test_blocks_do_not_matter_and_options_are_checked(monkeypatch):
    for prune in ((1,), (0, 2, 1), (), (0,) * 4):
        with pytest.raises(ValueError):
            TrainingOptions(prune=prune)
    with pytest.raises(ValueError, match="no words"):
        train(count_ngrams([], 3), TrainingOptions())
    text = random_text(1, 200)
    expected = count_ngrams(text, 3)
    monkeypatch.setattr("u2moe.runtime.language.kneser_ney._BLOCK", 50)
    counts = count_ngrams(text, 3)
    assert (counts.rows == expected.rows).all()
    assert (counts.counts == expected.counts).all()
    assert counts.num_sentences == 200
