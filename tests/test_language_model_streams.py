"""Language models of recognisers and streams, through the public API and the command line."""

import dataclasses
import gc
import json
import pickle
import weakref

import pytest
from commands import transcribe
from feeding import CHUNKED, feed, feed_together
from language_models import random_arpa
from tones import SYMBOLS, say

from u2moe.runtime import Bundle, DecodingOptions, LanguageModel, LanguageModelOptions, Recognizer
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli.options import language_model_options
from u2moe.runtime.decoding.fusion import Fusion


def arpa_of(**log_probs):
    lines = "\n".join(f"{log_prob}\t{word}" for word, log_prob in {"<unk>": -9, "</s>": -1, **log_probs}.items())
    return f"\\data\\\nngram 1={len(log_probs) + 2}\n\n\\1-grams:\n{lines}\n\n\\end\\\n"


@pytest.fixture
def options(tmp_path):
    """Return a function from word probabilities to options with that model."""

    def options(*, weight=1.0, **log_probs):
        path = tmp_path / "words.arpa"
        path.write_text(arpa_of(**log_probs), encoding="utf-8")
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


def test_options_reach_worker_processes_and_wrong_settings_are_named(toy, tmp_path):
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCD", 3), encoding="utf-8")
    options = LanguageModelOptions(model=LanguageModel.open(tmp_path / "toy.arpa"), weight=0.25)
    copied = pickle.loads(pickle.dumps(options))
    tokens = [1, 2, SYMBOLS.index("\u2581D"), 3]
    assert Fusion(copied, toy.vocabulary).score(tokens) == Fusion(options, toy.vocabulary).score(tokens) != 0
    for text, message in (
        ("demo,weight=x", "--lm: weight must be a number, got 'x'"),
        ("demo,wait=0.3", r"--lm: found wait=0.3, expected a setting \(weight, .*\) or WORD=FILE: .*No such file"),
        ("demo,weight=-1", "weight must be"),
        ("demo,level=letter", "level must be"),
    ):
        with pytest.raises(ValueError, match=message):
            language_model_options(text)


def test_a_server_uses_one_model_for_all_streams_and_files(bundle, tmp_path):
    pytest.importorskip("starlette", reason="needs the extra server")
    from u2moe.runtime.server.metrics import Metrics  # noqa: PLC0415
    from u2moe.runtime.server.options import ServerOptions  # noqa: PLC0415
    from u2moe.runtime.server.service import Service  # noqa: PLC0415

    (tmp_path / "toy.arpa").write_text(random_arpa(1, "ABCD", 2), encoding="utf-8")
    language_model = LanguageModelOptions(model=tmp_path / "toy.arpa")
    recognizer = Recognizer.load(bundle.path, options=DecodingOptions(language_model=language_model))
    options = Service({"toy": recognizer}, ServerOptions(), Metrics()).default.stream_options
    streams = [recognizer.create_stream(options) for _ in range(2)]
    assert recognizer.options.language_model is options.language_model is language_model
    assert streams[0].state.fusion is streams[1].state.fusion is not None


@pytest.mark.slow
def test_the_command_line_has_a_model(bundle, clips, capsys):
    words = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    (clips / "toy.arpa").write_text(random_arpa(1, words, 2, share=0.1), encoding="utf-8")
    (clips / "names.txt").write_text("ANNA\nBOB\n", encoding="utf-8")
    options = ["--lm", f"{clips / 'toy.arpa'},weight=0.3,A={clips / 'names.txt'}"]
    assert transcribe(bundle, "-f", "json", *options, clips / "a.wav") == 0
    (line,) = capsys.readouterr().out.splitlines()
    alternatives = json.loads(line)["segments"][0]["nbest"]
    assert all(alternative["language_score"] for alternative in alternatives)
    for alternative in alternatives:  # the second pass adds it in full
        acoustic = alternative["ctc_score"] - alternative["language_score"]
        expected = alternative["attention_score"] + 0.3 * acoustic + alternative["language_score"]
        assert alternative["score"] == pytest.approx(expected, abs=1e-3)
    assert transcribe(bundle, "--lm", clips / "a.wav", clips / "a.wav") == 1
    assert "a.wav: cannot be read as an ARPA file" in capsys.readouterr().err
