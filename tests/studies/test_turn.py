"""The study of turn ends: pauses within sentences, and its report on invented results."""

import numpy as np
import pytest
from feeding import RATE

from u2moe.benchmarks.studies import turn
from u2moe.runtime import EndpointConfig, Recognizer
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.decoding.fusion import Fusion


@pytest.fixture(scope="module")
def demo():
    return Recognizer.from_pretrained()


def test_utterances_follow_each_other_with_pauses_and_values_are_shares_of_all_sets(demo):
    clip = DEMO_FOLDER / "clips" / "question.flac"
    recording = Recording(path=clip, transcript="WHAT DO YOU WANT TO KNOW")
    samples, end = turn.with_pause(demo, recording, np.random.default_rng(0))
    assert end + turn.SILENCE_S == pytest.approx(len(samples) / RATE, abs=1e-3)
    assert turn.with_pause(demo, Recording(path=clip, transcript="WHAT DO YOU"), np.random.default_rng(0)) is None
    found = turn.measure(demo, [recording], Fusion(demo.language_model, demo.vocabulary))
    assert found.keys() == turn.rules().keys()
    assert all(each["num_sentences"] == 1 for each in found.values())
    assert found["silence of 0.6 s"]["p50"] < found["silence of 1.2 s"]["p50"]
    silent = np.full((60, len(demo.vocabulary)), -9.0, np.float32)
    silent[:, 0] = -0.01
    fusion = Fusion(demo.language_model, demo.vocabulary)
    assert turn.endpoints(demo, silent, EndpointConfig(), fusion) == [2.4]
    assert turn.endpoints(demo, np.tile(silent, (2, 1)), EndpointConfig(), fusion) == pytest.approx([2.4, 4.8, 7.2])
    own = {"num_cut": 1, "num_sentences": 4, "p50": 0.6, "p90": 1.8}
    found = turn.values({"sets": {name: dict.fromkeys(turn.rules(), own) for name in ("few", "many")}})
    assert (found["turn_cut"], found["turn_delay"]) == ("25%", "0.60")
    assert "| few | turn=0.1 | 0.60, 1.80 s | 1 of 4 |" in found["table"]
