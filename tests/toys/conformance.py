"""The cases of tests/conformance, which every runtime runs: Python's results, and their comparison. A file of cases has
`cases`, each with its input and its `result`, and shared fields. Cases of recordings have no result, because int8
rounds differently on other processors. Their result is what Python recognises in the same run."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from manifests import edited
from packed import read_text
from searches import SYMBOLS, VOCABULARY
from tones import CONFIG, MANIFEST, ToySession

import u2moe
from u2moe.runtime.audio.arrays import SincResampler
from u2moe.runtime.audio.padding import Padding
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.alignment import find_cut
from u2moe.runtime.decoding.ctc import GreedySearch
from u2moe.runtime.decoding.language_model_weights import attach
from u2moe.runtime.decoding.pauses import end_at_pauses, find_pauses, first_pause
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.decoding.utterance import Endpointer
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.model import TokenScores

FOLDER = Path(__file__).parents[1] / "conformance"
PACKED = ("search", "endpoint", "partials", "features", "padding", "resampling")
"""Kinds whose cases are thousands of numbers, in `.json.xz`. `xz -d` makes a file to edit, which has precedence."""


def text_of(kind):
    """Return a file of cases as text."""
    file = FOLDER / f"{kind}.json"
    packed = kind in PACKED and not file.exists()
    return read_text(FOLDER / f"{kind}.json.xz") if packed else file.read_text(encoding="utf-8")


def load(kind):
    """Return the content of a file of cases."""
    return json.loads(text_of(kind))


def unpacked(kind, folder):
    """Write a file of cases as text, and return its path."""
    file = folder / f"{kind}.json"
    file.write_text(text_of(kind), encoding="utf-8")
    return file


def frames_of(case):
    """Return log-probabilities [frames, symbols]."""
    return np.array(case["frames"], np.float32).reshape(-1, len(SYMBOLS))


def _search(case, shared, folder):
    fusion, options = None, case["language_model"]
    if options:
        file = folder / f"{options['model']}.arpa"
        file.write_text(shared["models"][options["model"]], encoding="utf-8")
        model = u2moe.LanguageModel.open(file)
        fusion = u2moe.Fusion(u2moe.LanguageModelOptions(**{**options, "model": model}), VOCABULARY)
    context = u2moe.ContextGraph(u2moe.parse_hotwords(case["hotwords"]), VOCABULARY) if case["hotwords"] else None
    penalty, lines = case["blank_penalty"], case.get("grammar")
    grammar = PhraseGraph(u2moe.Grammar(lines=lines), VOCABULARY) if lines else None
    vocabulary = grammar.vocabulary if grammar else VOCABULARY
    search = GreedySearch(0, blank_penalty=penalty)
    if case["search"] == "ctc_prefix_beam":
        search = u2moe.PrefixBeamSearch(case["beam_size"], 0, context, fusion, grammar=grammar, blank_penalty=penalty)
    committed, num_tokens, frames = [], 0, frames_of(case)
    for place in range(0, len(frames) + 1, 4):
        search.advance(frames[place : place + 4])
        tokens, ends = search.settled(vocabulary.word_starts)
        words = vocabulary.complete_words(tokens, ends=ends)
        search.commit(tokens[: words[-1].end if words else 0])
        num_tokens += words[-1].end if words else 0
        committed.append([num_tokens, search.next_peak()])
    partial = search.hypotheses(1)[0].tokens
    search.finish()
    found = search.hypotheses()
    best = found[0].tokens if found else []
    shown = {
        "partial": partial,
        "committed": committed,
        "tokens": [each.tokens for each in found],
        "times": [each.times for each in found],
        "scores": [[each.score, each.context_score, each.language_score] for each in found],
        "probabilities": [each.probabilities for each in found],
        "text": vocabulary.text(best),
        "words": [[word.text, word.begin, word.end] for word in vocabulary.words(best)],
    }
    return shown | {"phrases": [list(each) for each in grammar.phrases(best)]} if grammar else shown


def rules_of(options):
    """Return an EndpointConfig from JSON."""
    rules = {name: u2moe.EndpointRule(**value) for name, value in options.items() if isinstance(value, dict)}
    return u2moe.EndpointConfig(**(options | rules))


def demo_with_defaults(kind, folder):
    """Return the demo model; for cases with `decoding`, a copy in `folder` with that and its language model."""
    decoding = load(kind).get("decoding")
    if decoding is None:
        return DEMO_FOLDER
    target = folder / "demo"
    target.mkdir()
    for name in ("bundle.json", *u2moe.Bundle.open(DEMO_FOLDER).manifest.files):
        shutil.copy(DEMO_FOLDER / name, target)
    attach(target, u2moe.LanguageModelOptions(model=DEMO_FOLDER / "language.lm"))
    edited("decoding", **decoding)(target)
    return target


def clips():
    """Return the demo's clips with pauses between them, starting within a sound, int16 at 16 kHz."""
    read = [soundfile.read(file, dtype="int16")[0] for file in sorted(DEMO_FOLDER.glob("clips/*.flac"))]
    return np.concatenate([np.append(clip, np.zeros(8000, np.int16)) for clip in read])[4000:]


def recognized_case(recognizer, case, samples, model, networks):
    """Return the segments of a case: samples at 16 kHz, a language model file, and a folder of networks by `write_vad`.
    Options that a case lacks are those of the bundle."""
    options = dict(case["options"])
    hotwords, speech = (options.pop(name, None) for name in ("hotwords", "vad"))
    if "language_model" in options:  # null: none
        weights = options["language_model"]
        options["language_model"] = u2moe.LanguageModelOptions(model=model, **weights) if weights else "none"
    if "grammar" in options:
        options["grammar"] = u2moe.Grammar(lines=options["grammar"])
    if "text_format" in options:
        options["text_format"] = u2moe.TextFormat(**options["text_format"])
    rules = options.pop("endpoint", recognizer.default_endpoint)
    chosen = u2moe.DecodingOptions(**options, endpoint=rules_of(rules) if isinstance(rules, dict) else rules)
    hotwords = hotwords if hotwords is None else u2moe.parse_hotwords(hotwords)  # "": none
    whole, vad = np.tile(samples, case["repeats"]), None
    if chosen.chunk_size is None:
        if speech is not None:
            when = {name: value for name, value in speech.items() if name != "network"}
            vad = u2moe.VoiceActivityDetector(networks / f"{speech['network']}.onnx", u2moe.VadOptions(**when))
        return recognizer.transcribe(whole, 16_000, options=chosen, hotwords=hotwords, vad=vad).segments
    return segments_of(recognizer.create_stream(chosen, hotwords=hotwords), recognizer, whole)


def segments_of(stream, recognizer, samples, rate=16_000):
    """Return the segments of a stream of samples."""
    stream.accept_waveform(rate, samples)
    stream.input_finished()
    recognizer.decode_streams([stream])
    return stream.take_segments()


def _endpoint(case, _shared, _folder):
    found = Endpointer(rules_of(case["endpoint"]), case["frame_s"], 0).advance(frames_of(case))
    return {
        "endpoint": found and {"num_frames": found.num_frames, "trailing_silence": found.trailing_silence},
        "cut": find_cut(VOCABULARY, case["tokens"], frames_of(case)),
    }


class NumberedModel(ToySession):
    """Its encoder numbers frames from 0; its CTC head returns the given log-probabilities for these numbers."""

    has_decoder, search_library = False, None

    def __init__(self, frames):
        super().__init__()
        self.config = dataclasses.replace(CONFIG, output_size=1, vocab_size=len(SYMBOLS))
        self.manifest, self.vocabulary = dataclasses.replace(MANIFEST, model=self.config), VOCABULARY
        self.encoder, self.frames, self.num_encoded = Encoder(self, self.config), frames, 0

    def run(self, feeds):
        found = super().run(feeds)
        num = found["output"].shape[1]
        self.num_encoded += num
        numbers = np.arange(self.num_encoded - num, self.num_encoded, dtype=np.float32)
        return {**found, "output": numbers.reshape(1, -1, 1)}

    def ctc(self, encoder_out):
        return self.frames[encoder_out[:, 0].astype(int)]


def _partials(case, _shared, _folder):
    model, partials = NumberedModel(frames_of(case)), []
    observer = Observer(concluded=lambda _: partials.append(stream.get_result()))
    recognizer = u2moe.Recognizer(model, model, observer=observer)
    options = u2moe.DecodingOptions(chunk_size=case["chunk_size"], endpoint=rules_of(case["endpoint"]))
    stream = recognizer.create_stream(options)
    segments_of(stream, recognizer, np.zeros(240 + (4 * len(model.frames) + 3) * 160, np.float32))
    return {"partials": [[each.text, each.tokens, each.num_committed, each.committed_end] for each in partials]}


def _pauses(case, _shared, _folder):
    levels = np.array(case["levels"], np.float32)
    pauses = find_pauses(levels, case["frame_s"])
    words, peaks = ([tuple(each) for each in case[name]] for name in ("words", "peaks"))
    first = first_pause(levels, case["frame_s"], case["pause"], case["after_s"])
    ends = end_at_pauses(words, peaks, pauses)
    return {"pauses": list(map(list, pauses)), "words": list(map(list, ends)), "first": first and list(first)}


def _samples(case):
    return np.array(case["samples"], np.float32) / np.float32(32768)


def _padding(case, _shared, _folder):
    padding, samples = Padding(case["padding_s"], 16_000, 400), _samples(case)
    heard = [*padding.accept(samples[: case["split"]]), *padding.accept(samples[case["split"] :]), *padding.finish()]
    return {"num_before": padding.num_before, "num_heard": len(heard), "num_sounds": int(np.count_nonzero(heard))}


def _features(case, _shared, _folder):
    return {"features": fbank(_samples(case), FeatureConfig(**case["features"])).ravel().tolist()}


def _resampling(case, _shared, _folder):
    return {"samples": SincResampler(case["rate"], 16_000).resample_chunk(_samples(case), last=True).tolist()}


def _rescoring(case, _shared, _folder):
    right = case["right"] and np.array(case["right"], np.float32)
    scores = TokenScores(left=np.array(case["left"], np.float32), right=right, next=np.zeros((0, 0), np.float32))
    hypotheses = [u2moe.Hypothesis(**each) for each in case["hypotheses"]]
    names = [each.name for each in dataclasses.fields(u2moe.RescoringWeights)]
    weights = u2moe.RescoringWeights(**{name: case[name] for name in names})
    found = u2moe.attention_rescoring(hypotheses, scores, weights)
    return {
        "tokens": [each.hypothesis.tokens for each in found],
        "scores": [[each.score, each.attention_score] for each in found],
        "probabilities": [each.token_probabilities for each in found],
    }


def _written(case, _shared, _folder):
    text, unscored = case["text"], {"tokens": [], "score": 0.0, "ctc_score": None, "attention_score": None}
    words = [
        u2moe.WordResult(word=word, start=place, end=place + 1, confidence=1 - place / 8)
        for place, word in enumerate(text.split() if case["has_words"] else [])
    ]
    nbest = [u2moe.Alternative(text=each, **unscored) for each in (text, "OTHER")]
    found = u2moe.TextFormatter().result(u2moe.Result(text=text, is_final=True, words=words, nbest=nbest))
    beginnings = [text[:place] for place, character in enumerate(text) if character == " "]
    partials = [u2moe.Result(text=each, is_final=False, committed=each) for each in beginnings]
    return {
        "committed": [u2moe.TextFormatter().result(each).num_committed for each in partials],
        "text": found.text,
        "words": [[word.word, word.start, word.end, word.confidence] for word in found.words],
        "nbest": [alternative.text for alternative in found.nbest],
    }


COMPUTED = {
    "search": _search, "endpoint": _endpoint, "partials": _partials, "pauses": _pauses, "padding": _padding,
    "features": _features, "resampling": _resampling, "rescoring": _rescoring, "written": _written,
}  # fmt: skip
"""Python's result for each kind: a function of a case, of its file's shared fields, and of a folder for files."""


def assert_same(kind, found, names=None):
    """Check that results equal the cases: doubles to 1e-9, samples and features to 2e-7, others exactly.

    Args:
        kind: the file of cases.
        found: results in order, each with some of the fields.
        names: the cases that a runtime can run; None: all.
    """
    cases = [case for case in load(kind)["cases"] if names is None or case["name"] in names]
    for case, ours in zip(cases, found, strict=True):
        for field, theirs in case["result"].items():
            if field in ours:
                _compare(ours[field], theirs, f"{kind} {case['name']}: {field}")


def _compare(ours, theirs, where):
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _compare(one, other, f"{where} {index}")
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs:
            _compare(ours[name], theirs[name], f"{where} {name}")
    else:
        assert ours == (pytest.approx(theirs, rel=1e-9, abs=2e-7) if isinstance(theirs, float) else theirs), where


def recognized(bundle, model, samples, rate=16_000, hotwords=None, endpoint=None, **options):
    """Return the segments that Python finds in a stream of samples; other options default to those of the programs."""
    options = {"chunk_size": 16, "num_left_chunks": 4, "endpoint": endpoint or u2moe.EndpointConfig()} | options
    recognizer = u2moe.Recognizer(bundle, model, u2moe.DecodingOptions(**options))
    return segments_of(recognizer.create_stream(hotwords=hotwords), recognizer, samples, rate)


def assert_same_segments(found, expected):
    """Check that segments from JSON equal Python's; scores and confidences to single precision."""
    assert len(found) == len(expected)
    compared = {"words": ("word", "start", "end"), "phrases": ("phrase", "start", "end"), "nbest": ("tokens", "times")}
    for theirs, ours in zip(found, map(dataclasses.asdict, expected), strict=True):
        for field in ("text", "tokens", "segment", "times", "committed", "revised"):
            assert theirs[field] == ours[field]
        for field, names in compared.items():
            one, other = ([[each[name] for name in names] for each in own[field]] for own in (theirs, ours))
            assert one == other
        for field, name, limit in (("words", "confidence", 1e-3), ("nbest", "score", 0.02)):  # of a hundred tokens
            one, other = ([each[name] for each in own[field]] for own in (theirs, ours))
            assert one == pytest.approx(other, abs=limit)
        assert theirs["score"] == pytest.approx(ours["score"], abs=0.02)
