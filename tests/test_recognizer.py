import dataclasses
import gc
import types
import weakref

import numpy as np
import pytest
import soundfile
from feeding import RATE, TINY

from u2moe.runtime import ContextGraph, DecodingOptions, Recognizer, bundle_location
from u2moe.runtime.decoding.ctc import ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.errors import AudioError, BundleError, StreamError, TruncatedAudioError
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.session import Session
from u2moe.runtime.text.vocabulary import Vocabulary


def test_full_context_is_the_seam_from_end_to_end(recognizer, sound):
    model = recognizer.model
    encoder_out = model.encode(fbank(sound, recognizer.bundle.manifest.features))
    hypotheses = ctc_prefix_beam_search(model.ctc(encoder_out), 10)
    left, right = model.rescore(encoder_out, [h.tokens for h in hypotheses])
    scores = 0.7 * left + 0.3 * right + 0.3 * np.array([h.score for h in hypotheses])
    result = recognizer.transcribe(sound).segments[0]
    assert result.tokens == hypotheses[scores.argmax()].tokens
    assert result.score == pytest.approx(scores.max(), abs=1e-3)


@pytest.mark.parametrize(("options", "choose"), [
    (DecodingOptions(search="ctc_greedy"), ctc_greedy_search),
    (DecodingOptions(search="ctc_prefix_beam", beam_size=4), lambda p: ctc_prefix_beam_search(p, 4)[0]),
])  # fmt: skip
def test_first_pass_searches(recognizer, sound, options, choose):
    model = recognizer.model
    expected = choose(model.ctc(model.encode(fbank(sound, recognizer.bundle.manifest.features), 16, 1)))
    options = dataclasses.replace(options, chunk_size=16, num_left_chunks=1)
    result = recognizer.transcribe(sound, options=options).segments[0]
    assert result.tokens == expected.tokens
    # The first pass sums chunks in the same order as the whole recording.
    assert result.score == pytest.approx(expected.score, abs=1e-3)
    assert result.times == [round(time * 0.04, 3) for time in expected.times]
    words = recognizer.vocabulary.words(expected.tokens)
    least_sure = [min(expected.probabilities[word.begin : word.end]) for word in words]
    assert [word.confidence for word in result.words] == pytest.approx(least_sure)
    assert result.confidence == pytest.approx(np.mean(least_sure))
    assert result.nbest[0].attention_score is None


def test_attention_search_and_hotwords_of_its_vocabulary(recognizer, sound):
    result = recognizer.transcribe(sound[:16_000], options=DecodingOptions(search="attention", beam_size=3)).segments[0]
    assert len(result.nbest) == 3
    assert result.nbest[0].ctc_score is None
    # The decoder has no times: they are from a forced alignment, if possible.
    assert result.times == sorted(result.times)
    assert len(result.times) in (0, len(result.tokens))
    assert len(result.words) == len(result.times)
    left_only = recognizer.transcribe(sound, options=DecodingOptions(ctc_weight=0, reverse_weight=0)).segments[0]
    assert left_only.score == left_only.nbest[0].attention_score
    assert recognizer(sound, 16_000) == recognizer.transcribe(sound)
    vocabulary = recognizer.vocabulary
    word = next(symbol for symbol in vocabulary.symbols if symbol.isalpha())
    recognizer.create_stream(hotwords=ContextGraph([word], Vocabulary(vocabulary.symbols, vocabulary.config)))
    other = ContextGraph([word], Vocabulary((*vocabulary.symbols, "x"), vocabulary.config))
    for create in (recognizer.create_stream, recognizer.create_recording_stream):
        with pytest.raises(ValueError, match="vocabulary of another bundle"):
            create(hotwords=other)


def test_alternatives_have_texts_of_their_own(bundle, model, sound):
    """Of several tokenizations of the same text, only the best is an alternative."""
    plain = Recognizer(bundle, model).transcribe(sound).segments[0]
    symbols = ["a"] * len(bundle.vocabulary)
    doubled = types.SimpleNamespace(manifest=bundle.manifest, vocabulary=Vocabulary(symbols, bundle.manifest.text))
    found = Recognizer(doubled, model).transcribe(sound).segments[0]
    expected = {}
    for item in plain.nbest:
        expected.setdefault(doubled.vocabulary.text(item.tokens), (item.tokens, item.score))
    assert len(expected) < len(plain.nbest)
    assert [(item.text, (item.tokens, item.score)) for item in found.nbest] == list(expected.items())


def test_models_of_one_chunk_size_and_without_decoder(bundle, model, sound):
    """WeNet then always applies a chunk mask, so full context is unavailable."""
    config = dataclasses.replace(model.config, static_chunk_size=8)
    manifest = dataclasses.replace(bundle.manifest, model=config)
    static = Recognizer(bundle, Model(manifest, model.encoder.session, model._ctc, model._decoder))
    expected = Recognizer(bundle, model).transcribe(sound, options=DecodingOptions(chunk_size=8, num_left_chunks=-1))
    assert (static.transcribe(sound), static.create_stream().options.chunk_size) == (expected, 8)
    features = fbank(sound, manifest.features)
    assert np.array_equal(static.model.encode(features), model.encode(features, 8))
    ctc_only = Model(bundle.manifest, model.encoder.session, model._ctc, None)
    recognizer = Recognizer(bundle, ctc_only)
    assert recognizer.transcribe(sound).segments[0].nbest[0].attention_score is None
    for search in ("attention", "attention_rescoring"):
        with pytest.raises(StreamError, match="needs a decoder"):
            Recognizer(bundle, ctc_only, DecodingOptions(search=search))
        with pytest.raises(StreamError, match="needs a decoder"):
            recognizer.transcribe(sound, options=DecodingOptions(search=search))


def test_from_pretrained(bundle, model, sound, monkeypatch, tmp_path):
    options = DecodingOptions(search="ctc_greedy")
    recognizer = Recognizer.from_pretrained(bundle.path, num_threads=2, options=options)
    assert recognizer.transcribe(sound) == Recognizer(bundle, model, options).transcribe(sound)
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", tmp_path / "none")
    with pytest.raises(BundleError, match=r"not installed: run pip install \./runtime/demo .*, or name"):
        Recognizer.from_pretrained()
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", bundle.path)
    assert Recognizer.from_pretrained().bundle.path == bundle.path


@pytest.mark.parametrize("streaming", [True, False])
def test_warm_up_runs_every_graph_and_changes_no_result(bundle, model, sound, monkeypatch, streaming):
    ran, run = [], Session.run
    monkeypatch.setattr(Session, "run", lambda self, feeds: ran.append(self.graph.name) or run(self, feeds))
    recognizer = Recognizer(bundle, model)
    expected = recognizer.transcribe(sound)
    ran.clear()
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, streaming=streaming))
    recognizer.warm_up()
    assert (set(ran), ran.count("encoder") > 1) == ({"encoder", "ctc", "decoder"}, streaming)
    monkeypatch.undo()
    assert recognizer.transcribe(sound) == expected


def test_what_is_dropped_is_freed_at_once(bundle, sound):
    """Not at garbage collection: a model may take a gigabyte."""
    recognizer = Recognizer(bundle, bundle.load())
    recognizer.transcribe(sound)
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, sound)
    recognizer.decode_streams([stream])
    model = weakref.ref(recognizer.model)
    gc.disable()
    try:
        del recognizer, stream
        assert model() is None
    finally:
        gc.enable()


@pytest.fixture
def recording(sound, tmp_path):
    """Return a file and the samples of its first channel."""
    long = np.tile(sound, 6)
    soundfile.write(tmp_path / "a.wav", np.stack([long, -long], axis=1), RATE, subtype="FLOAT")
    return tmp_path / "a.wav", long


@pytest.mark.slow
@pytest.mark.parametrize("options", [None, TINY])
def test_files_and_arrays_are_heard_and_told_piece_by_piece(recognizer, recording, options):
    """For any length: features are never all in memory at the same time."""
    (file, long), read, told = recording, [], []
    segments = recognizer.segments(str(file), options=options, channel=0, on_progress=read.append)
    assert read == []  # audio is read only on request
    found = [next(segments)]
    assert options is None or len(read) <= 1  # the first segment comes long before the end
    transcript = recognizer.transcribe(long, options=options, on_progress=told.append)
    assert [*found, *segments] == transcript.segments
    assert [segment.segment for segment in transcript.segments] == list(range(18 if options else 2))
    assert read == told == [10.0, 20.0, 24.0]
    assert (transcript.complete, transcript.error) == (True, None)


@pytest.mark.slow
def test_damage_late_in_a_file_keeps_what_was_before(recognizer, recording):
    file, long = recording
    expected = recognizer.transcribe(long[: 12 * RATE], options=TINY)
    file.write_bytes(file.read_bytes()[: -8 * 12 * RATE])
    transcript = recognizer.transcribe(file, options=TINY, channel=0)
    assert (transcript.segments, transcript.text, transcript.duration) == (expected.segments, expected.text, 12.0)
    assert len(expected.segments) > 6
    assert not transcript.complete
    assert transcript.error.startswith(f"{file}: contains ")
    found = []
    with pytest.raises(TruncatedAudioError, match="it is truncated"):
        found.extend(recognizer.segments(file, options=TINY, channel=0))
    assert found == expected.segments


def test_what_cannot_be_read_is_refused_at_once_and_a_mistake_of_the_program_no_damage(recognizer, sound, tmp_path):
    def on_progress(seconds):
        raise AudioError("mine")

    (tmp_path / "text.wav").write_text("not audio")
    for call in (recognizer.transcribe, recognizer.segments):
        for audio in (tmp_path / "none.wav", np.array([np.nan]), tmp_path / "text.wav"):
            with pytest.raises(AudioError, match=r"no such file|NaN|be read as"):
                call(audio)
        with pytest.raises(ValueError, match="channel and track are only for files"):
            call(sound, channel=0)
    with pytest.raises(AudioError, match="mine"):
        recognizer.transcribe(sound, on_progress=on_progress)
