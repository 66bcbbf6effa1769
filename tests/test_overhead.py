import json

import numpy as np
import pytest

from u2moe.benchmarks import overhead
from u2moe.benchmarks.overhead import demo_posteriors, instrument, main, table, widened
from u2moe.benchmarks.utterances import clips
from u2moe.runtime import Bundle
from u2moe.runtime.recognizer import DEMO_FOLDER


@pytest.fixture(scope="module")
def demo():
    return Bundle.open(DEMO_FOLDER)


def test_widened_posteriors_keep_their_best_tokens():
    log_probs = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32))
    wide = widened(log_probs, 6, 2)
    assert wide.shape == (2, 6)
    assert wide.argmax(axis=1).tolist() == [2, 0]  # blank has changed places with token 2
    assert np.array_equal(wide[:, [2, 1, 0]], log_probs)
    assert (wide[:, 3:].max(axis=1) < log_probs.min(axis=1)).all()
    assert widened(log_probs, 2, 0).shape == (2, 2)


def test_streams_hear_what_they_are_given(demo):
    """Whatever sounds, the words are those of the posteriors."""
    log_probs = np.full((1000, demo.manifest.model.vocab_size), -20.0, np.float32)
    log_probs[:, demo.manifest.model.blank] = -0.01
    log_probs[5, 7] = 0.0
    listener = instrument(demo, log_probs)
    heard = overhead.case(listener, np.zeros(48_000, np.float32), 1)()
    assert [segment.tokens for segment in heard.segments] == [[7]]
    assert heard.stages["ctc"] > 0
    assert heard.stages["rescoring"] == 0


def test_posteriors_are_stretched_to_the_frames_of_a_model(demo):
    own = demo.manifest.model.subsampling_rate * demo.manifest.features.frame_shift_ms / 1000
    plain, twice = demo_posteriors(demo, own), demo_posteriors(demo, own / 2)
    assert abs(len(twice) - 2 * len(plain)) <= 1
    assert np.array_equal(twice[::2][: len(plain)], plain[: len(twice[::2])])


def test_shares_are_of_the_encoder(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overhead, "clips", lambda: clips()[:1])
    file = tmp_path / "overhead.json"
    main([str(DEMO_FOLDER), "--repetitions", "1", "--json", str(file)])
    results = json.loads(file.read_text())
    assert [(case["posteriors"], case["num_streams"]) for case in results["cases"]] == [
        (kind, num) for kind in ("speech", "blank", "own") for num in (1, 8)
    ]
    for case in results["cases"]:
        seconds = {stage: spread["median"] for stage, spread in case["chunk_s"].items()}
        parts = [seconds[stage] / seconds["encoder"] for stage in ("features", "search", "other")]
        assert case["shares"]["own"]["median"] == pytest.approx(sum(parts))
        assert all(part > 0 for part in parts)
    assert capsys.readouterr().out.endswith(table(results) + "\n")
    assert table(results).count("| runtime/demo |") == 6
