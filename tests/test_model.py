"""Outputs, searches and rescoring equal WeNet's, for golden networks and each kind of network; errors of `Model`."""

from unittest.mock import Mock

import golden_recordings as recordings
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wenet_directories import write_configuration

from u2moe.runtime import Bundle, RescoringWeights, attention_beam_search, attention_rescoring, ctc_greedy_search
from u2moe.runtime.decoding.ctc import ctc_prefix_beam_search
from u2moe.runtime.errors import ProviderError, StreamError
from u2moe.runtime.model import model as model_module
from u2moe.runtime.model.model import Model, _batches, _Size

pytestmark = pytest.mark.slow
KNOWN = recordings.known()


@pytest.fixture(scope="session")
def golden_model(golden, exported):
    return Bundle.open(exported(golden.path.name)).load()


def test_everything_equals_wenet(golden, golden_model):
    for utterance, mode, results in golden.cases():
        chunks = () if mode == "full" else (16, int(mode.removeprefix("stream16_")))
        encoder_out = golden_model.encode(golden.features[utterance], *chunks)
        # Single precision for outputs of magnitude 1 after three blocks.
        np.testing.assert_allclose(encoder_out, golden.arrays[f"{utterance}/{mode}/out"], atol=1e-5)
        log_probs = golden_model.ctc(encoder_out)
        np.testing.assert_allclose(log_probs, golden.arrays[f"{utterance}/{mode}/ctc_logprobs"], atol=5e-5)
        assert ctc_greedy_search(log_probs).tokens == results["ctc_greedy_search"]["tokens"]
        expected = results["ctc_prefix_beam_search"]
        hypotheses = ctc_prefix_beam_search(log_probs, 10)
        assert [h.tokens for h in hypotheses] == expected["nbest"]
        assert [h.times for h in hypotheses] == expected["nbest_times"]
        np.testing.assert_allclose([h.score for h in hypotheses], expected["nbest_scores"], atol=1e-3)
        scores = golden_model.token_scores(encoder_out, [h.tokens for h in hypotheses])
        for name, expected in results.items():
            if name.startswith("attention_rescoring"):
                ctc, reverse = (float(part.split("=")[1]) for part in name.split()[1:])
                weights = RescoringWeights(ctc_weight=ctc, reverse_weight=reverse)
                best = attention_rescoring(hypotheses, scores, weights)[0]
                assert best.hypothesis.tokens == expected["tokens"]
                assert best.score == pytest.approx(expected["score"], abs=1e-3)
                np.testing.assert_allclose(best.token_confidences, expected["tokens_confidence"], rtol=1e-3)
        for length_penalty in (0.0, 0.6) if utterance in ("u131", "u15") else ():  # the decoder runs once per token
            best = attention_beam_search(
                lambda tokens, out=encoder_out: golden_model.token_scores(out, tokens).next, len(encoder_out),
                beam_size=5, eos=golden_model.config.eos, length_penalty=length_penalty,
            )[0]  # fmt: skip
            assert best.tokens == results[f"attention beam=5 length_penalty={length_penalty}"]["tokens"]


def found(model, encoded):
    """As `recordings.known`."""
    hypotheses = ctc_prefix_beam_search(model.ctc(encoded), recordings.BEAM_SIZE)
    tokens, chosen = [hypothesis.tokens for hypothesis in hypotheses], None
    if model.config.decoder != "none":
        left, right = model.rescore(encoded, tokens)
        backward = recordings.WEIGHTS["reverse_weight"] if model.config.bidirectional else 0
        first = recordings.WEIGHTS["ctc_weight"] * np.array([hypothesis.score for hypothesis in hypotheses])
        chosen = int(np.argmax((1 - backward) * left + backward * right + first))
    return [tokens, [hypothesis.times for hypothesis in hypotheses], chosen]


@pytest.mark.skipif(not recordings.CLIPS.is_dir(), reason="u2moe-demo, which has the recordings, is not installed")
@pytest.mark.parametrize("num", [4, pytest.param(None, marks=pytest.mark.endurance)])
@pytest.mark.parametrize("name", KNOWN)
def test_recordings_whole_and_in_chunks(name, num, export_quickly, tmp_path):
    known = {part: results[:num] for part, results in KNOWN[name].items()}
    checkpoint = write_configuration(name, tmp_path / "checkpoint", blank_bias=recordings.BLANK_BIAS)
    bundle = Bundle.open(export_quickly(checkpoint, tmp_path / "bundle"))
    model, heard = bundle.load(), [recordings.features(each, bundle.manifest.features) for each in known["recordings"]]
    assert heard
    assert [found(model, model.encode(features)) for features in heard] == known["whole"]
    assert ("chunks" in known) == bundle.manifest.model.streaming
    if "chunks" in known:
        encoded = [model.encode(features, recordings.CHUNK_SIZE, recordings.NUM_LEFT_CHUNKS) for features in heard]
        assert [found(model, each) for each in encoded] == known["chunks"]


def same_number(num):
    """Draw equally many hypotheses for one to three utterances: equal, empty, with eos, or with shared ends."""
    hypotheses = st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=num, max_size=num)
    return st.lists(hypotheses, min_size=1, max_size=3)


@settings(max_examples=20)
@given(st.integers(1, 5).flatmap(same_number))
def test_hypotheses_that_share_tokens_have_the_scores_that_they_have_alone(golden_model, utterances):
    random = np.random.default_rng(0)
    outputs = [random.standard_normal((9 + n, golden_model.config.output_size), np.float32) for n in range(3)]
    found = golden_model._decode(golden_model._decoder, list(zip(outputs, utterances, strict=False)))
    for row, hypotheses in enumerate(utterances):
        for column, tokens in enumerate(hypotheses):
            alone = golden_model.token_scores(outputs[row], [tokens])
            for name, values in {"score": alone.left, "r_score": alone.right, "next_log_probs": alone.next}.items():
                if values is not None:
                    own = found[name][row, column, : values.shape[1]]
                    np.testing.assert_allclose(own, values[0], atol=1e-5)


def test_hypotheses_of_a_long_utterance_are_scored_in_several_calls(golden_model, monkeypatch):
    """Attention needs memory for each pair of a token and a frame. Ten minutes in one call took 6 GB."""
    random = np.random.default_rng(0)
    output = random.standard_normal((90, golden_model.config.output_size), np.float32)
    hypotheses = [random.integers(1, golden_model.config.vocab_size - 1, 12 - i).tolist() for i in range(5)]
    expected = golden_model.token_scores(output, hypotheses)
    monkeypatch.setattr(model_module, "_MOST_PAIRS", 2 * 12 * 90)
    decoder = Mock(run=Mock(wraps=golden_model._decoder.run))
    model = Model(golden_model.manifest, golden_model.encoder.session, golden_model._ctc, decoder)
    found = model.token_scores(output, hypotheses)
    for name in ("left", "right", "next"):  # a matrix product with more rows may sum them in another order
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)
    assert decoder.run.call_count == 3


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60), st.integers(1, 500)), max_size=40), st.randoms())
def test_calls_are_neither_padded_much_nor_large(sizes, random):
    sizes = [_Size(*size) for size in sizes]
    random.shuffle(sizes)
    groups = _batches(sizes)
    assert sorted(index for group in groups for index in group) == [i for i, s in enumerate(sizes) if s.num_hypotheses]
    for group in groups:
        own = [sizes[index] for index in group]
        assert len({size.num_hypotheses for size in own}) == 1
        for values in ([size.length for size in own], [size.num_frames for size in own]):
            assert min(values) >= 0.85 * max(values)
        num_tokens = len(own) * own[0].num_hypotheses * (max(size.length for size in own) + 1)
        assert len(own) == 1 or num_tokens <= 512


def test_lengths(model):
    for chunk_size in (None, 1, 16):
        for num_frames, time in ((0, 0), (1, 0), (6, 0), (7, 1), (10, 1), (11, 2), (70, 16)):
            encoder_out = model.encode(np.zeros((num_frames, 80)), chunk_size=chunk_size)
            assert (encoder_out.shape, encoder_out.dtype) == ((time, 64), np.float32)
            assert model.ctc(encoder_out).shape == (time, model.config.vocab_size)


def test_refused_arguments_also_without_decoder(model):
    ctc_only = Model(model.manifest, model.encoder.session, model._ctc, None)
    assert not ctc_only.has_decoder
    assert [len(scores) for scores in model.rescore(np.zeros((3, 64)), [])] == [0, 0]
    for call, arguments, error, message in (
        (model.encode, (np.zeros((3, 40)),), ValueError, r"features must be \[time, 80\], got shape \(3, 40\)"),
        (model.encode, (np.zeros((9, 80)), 0), ValueError, "chunk_size must be at least 1, got 0"),
        (model.encode, (np.zeros((9, 80)), 16, -2), ValueError, "num_left_chunks must be"),
        (model.ctc, (np.zeros(64),), ValueError, "encoder_out must be"),
        (model.rescore, (np.zeros((0, 64)), [[1]]), ValueError, "at least one frame"),
        (model.rescore, (np.zeros((3, 64)), [[1, -1]]), ValueError, r"token ids outside 0\.\.59"),
        (model.rescore, (np.zeros((3, 64)), [[1, 60]]), ValueError, r"token ids outside 0\.\.59"),
        (ctc_only.rescore, (np.zeros((3, 64)), [[1]]), StreamError, "no attention decoder"),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, 800.0])
@pytest.mark.parametrize("output", ["log_probs", "score", "r_score", "next_log_probs"])
def test_what_is_no_probability_is_refused(model, monkeypatch, output, value):
    """Damaged weights cause such outputs. NaN would order hypotheses at random, and values above 1 would overflow."""
    encoder_out = model.encode(np.zeros((40, model.config.feature_size), np.float32))
    assert np.isfinite(model.ctc(encoder_out)).all()
    assert np.isfinite(model.rescore(encoder_out, [[5, 6], [7]])).all()
    session = model._ctc if output == "log_probs" else model._decoder
    run = session.run

    def damaged(feeds):
        outputs = {name: array.copy() for name, array in run(feeds).items()}
        outputs[output].flat[0] = value
        return outputs

    monkeypatch.setattr(session, "run", damaged)
    with pytest.raises(ProviderError, match=r"returned (nan|inf|800\.0) as a log-probability"):
        model.ctc(encoder_out) if output == "log_probs" else model.rescore(encoder_out, [[5, 6], [7]])
