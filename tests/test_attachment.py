"""Decoding defaults in a bundle, and a language model added by `u2moe lm attach`."""

import dataclasses
import shutil
import types

import pytest
from feeding import CHUNKED, feed
from language_models import random_arpa
from manifests import edited, with_decoding
from tones import say

from u2moe.export.profiles.conversion import convert_bundle
from u2moe.quantize import quantize_bundle, recipe
from u2moe.quantize.inspection import describe, inspect_bundle
from u2moe.runtime import (
    Bundle,
    BundleError,
    DecodingOptions,
    EndpointConfig,
    EndpointRule,
    IntegrityError,
    LanguageModelError,
    LanguageModelOptions,
    Recognizer,
    cli,
)
from u2moe.runtime.bundle.manifest import BundledLanguageModel
from u2moe.runtime.decoding.language_model_weights import LANGUAGE_MODEL_FILE, attach

WEIGHTS = {"weight": 2.0, "word_bonus": 1.5, "unknown_score": -8.0, "rescoring_weight": 0.5, "level": None}


@pytest.fixture(scope="module")
def arpa(bundle, tmp_path_factory):
    file = tmp_path_factory.mktemp("lm") / "words.arpa"
    file.write_text(random_arpa(1, bundle.tokens[3:20], 2), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def attached(bundle, arpa, tmp_path_factory):
    """A bundle with a language model, and a beam of 4."""
    folder = shutil.copytree(bundle.path, tmp_path_factory.mktemp("attached") / "bundle")
    text = ",".join([str(arpa), *(f"{name}={value:g}" for name, value in WEIGHTS.items() if value is not None)])
    assert cli.main(["lm", "attach", str(folder), text, "--beam-size", "4"]) == 0
    return folder


@pytest.fixture
def copy(attached, tmp_path):
    return shutil.copytree(attached, tmp_path / "bundle")


def test_a_bundle_is_written_anew_with_its_language_model(bundle, attached):
    made = Bundle.open(attached)
    assert made.manifest.decoding == dataclasses.replace(
        bundle.manifest.decoding, beam_size=4, language_model=BundledLanguageModel(file=LANGUAGE_MODEL_FILE, **WEIGHTS)
    )
    kept = {name: digest for name, digest in made.manifest.files.items() if name != LANGUAGE_MODEL_FILE}
    assert kept == bundle.manifest.files
    assert made.language_model().weights == WEIGHTS
    assert made.fingerprint != bundle.fingerprint


def test_options_go_before_the_bundle_and_the_bundle_before_the_library(bundle, attached, model, arpa, sound):
    plain, carried = Recognizer(bundle, model), Recognizer(Bundle.open(attached), model)
    given, defaults = LanguageModelOptions(model=arpa, **WEIGHTS), carried.transcribe(sound)
    assert defaults.segments[0].nbest[0].language_score
    same = DecodingOptions(beam_size=4, language_model=given)
    assert defaults == plain.transcribe(sound, options=same) != plain.transcribe(sound)
    without = DecodingOptions(beam_size=10, language_model="none")
    assert carried.transcribe(sound, options=without) == plain.transcribe(sound)
    other = DecodingOptions(beam_size=7, language_model=dataclasses.replace(given, weight=0.1))
    assert carried.transcribe(sound, options=other) == plain.transcribe(sound, options=other) != defaults
    greedy = DecodingOptions(search="ctc_greedy")  # cannot use what the bundle has
    assert carried.transcribe(sound, options=greedy) == plain.transcribe(sound, options=greedy)
    assert Recognizer(carried.bundle, model, without).create_stream().options.language_model == "none"


def test_a_bundle_has_hotwords_rules_and_weights(toy):
    def carrying(**changes):
        toy_bundle = type(toy.bundle)()
        toy_bundle.manifest = with_decoding(toy.bundle.manifest, **changes)
        return Recognizer(toy_bundle, toy.model)

    samples, _ = say("ABCD", [0.3] * 4)
    hotwords = carrying(hotwords=("# of the fair", "A B :2", "C"))
    given = Recognizer(toy.bundle, toy.model, hotwords=[("A B", 2.0), "C"])
    assert feed(hotwords, samples) == feed(given, samples) != feed(toy, samples)
    assert hotwords.create_stream(CHUNKED, hotwords=[]).state.context is None
    assert hotwords.create_stream(DecodingOptions(search="ctc_greedy")).state.context is None
    short = EndpointConfig(rule2=EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.1))
    ruled = carrying(endpoint=short, ctc_weight=0.7, reverse_weight=0.1)
    assert ruled.create_recording_stream().options.endpoint == short
    own = ruled.create_recording_stream(DecodingOptions(endpoint=EndpointConfig(), ctc_weight=0.2)).options
    assert (own.endpoint, own.ctc_weight, own.reverse_weight) == (EndpointConfig(), 0.2, 0.1)
    assert ruled.create_stream().options.endpoint is None  # a stream is one utterance unless it is asked to end some


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"hotwords": "A"}, BundleError, "decoding.hotwords must be a list, got 'A'"),
    ({"hotwords": ["A :x"]}, BundleError, "decoding: hotwords: hotwords line 1: weight must be a number, got 'x'"),
    ({"hotwords": ["Ω"]}, BundleError, "decoding: hotwords: "),
    ({"endpoint": {"rule4": None}}, BundleError, "decoding.endpoint.rule4"),
    ({"endpoint": {"pause": 0.1}}, BundleError, "decoding.endpoint: pause must be "),
    ({"language_model": {"weight": 1}}, BundleError, "decoding.language_model.file is missing"),
    ({"language_model": {"file": "a.lm", "weight": -1}}, BundleError, "decoding.language_model: weight must be "),
    ({"language_model": {"file": "../a.lm"}}, BundleError, "decoding: language_model: file is '../a.lm', which "),
    ({"language_model": {"file": "tokens.txt"}}, LanguageModelError, "tokens.txt: is not a compact language model"),
])  # fmt: skip
def test_defaults_that_are_wrong_are_named(copy, change, error, message):
    edited("decoding", **change)(copy)
    with pytest.raises(error) as caught:
        Recognizer.from_pretrained(copy)
    assert message in str(caught.value)
    assert str(copy) in str(caught.value)


def test_a_language_model_that_is_damaged_or_does_not_fit(copy, toy, model, tmp_path):
    (tmp_path / "latin.arpa").write_text(random_arpa(1, ["ALPHA", "BETA"], 2), encoding="utf-8")
    with pytest.raises(LanguageModelError, match=r"found words such as \('ALPHA', 'BETA'.*, expected words that the"):
        attach(copy, LanguageModelOptions(model=tmp_path / "latin.arpa"))
    with pytest.raises(LanguageModelError, match="expected tokens of the vocabulary"):
        attach(copy, LanguageModelOptions(model=tmp_path / "latin.arpa", level="token"))
    made = Bundle.open(copy)
    other = types.SimpleNamespace(
        path=copy, manifest=made.manifest, language_model=made.language_model, vocabulary=toy.vocabulary
    )
    with pytest.raises(LanguageModelError, match=r"bundle\.json: decoding: language_model: found words such as"):
        Recognizer(other, model)
    file = copy / LANGUAGE_MODEL_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match=r"language\.lm: sha256 is"):
        Recognizer.from_pretrained(copy)
    Recognizer.from_pretrained(copy, options=DecodingOptions(language_model="none"))  # which reads none


def test_a_model_is_replaced_and_removed_but_not_by_what_cannot_be_attached(copy, bundle, arpa):
    attach(copy, LanguageModelOptions(model=arpa, weight=0.25))
    assert Bundle.open(copy).language_model().weight == 0.25
    assert Bundle.open(copy).manifest.decoding.beam_size == 4
    assert cli.main(["lm", "attach", str(copy), "none"]) == 0
    assert Bundle.open(copy).manifest.files == bundle.manifest.files
    assert {file.name for file in copy.iterdir()} == {"bundle.json", *bundle.manifest.files}
    before = (copy / "bundle.json").read_bytes()
    with pytest.raises(ValueError, match="classes: a bundle cannot contain"):
        attach(copy, LanguageModelOptions(model=arpa, classes={Bundle.open(copy).tokens[5]: ["A"]}))
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        attach(copy, LanguageModelOptions(model=arpa), beam_size=0)
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleError, match=r"found 'notes\.txt', which would be deleted with the old bundle"):
        attach(copy, None)
    assert (copy / "bundle.json").read_bytes() == before
    assert (copy / "notes.txt").exists()


@pytest.mark.slow
def test_what_a_bundle_carries_is_shown_and_goes_with_it(attached, tmp_path):
    decoding = Bundle.open(attached).manifest.decoding
    shown = describe(inspect_bundle(attached))
    assert 'decoding defaults of the bundle: beam_size 4, language_model {"weight": 2.0' in shown
    assert '"file": "language.lm"' in shown
    made, _ = quantize_bundle(attached, tmp_path / "int8", recipe("int8"))
    assert made.manifest.decoding == decoding
    assert made.language_model().model.fingerprint == Bundle.open(attached).language_model().model.fingerprint
    assert LANGUAGE_MODEL_FILE in convert_bundle(attached, tmp_path / "ort", "ort").files
    notes = []
    convert_bundle(attached, tmp_path / "offline", "offline", progress=notes.append)
    assert "settings that the graphs do not include, left to the program: beam_size, language_model" in notes
