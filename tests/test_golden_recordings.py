"""Each kind of network hears in recordings what WeNet hears: all hypotheses, their times, and the decoder's choice."""

import golden_recordings as golden
import numpy as np
import pytest
from wenet_directories import write_configuration

from u2moe.runtime import Bundle, ctc_prefix_beam_search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not golden.CLIPS.is_dir(), reason="u2moe-demo, which has the recordings, is not installed"),
]
KNOWN = golden.known()


def found(model, encoded):
    """As `golden_recordings.known`."""
    hypotheses = ctc_prefix_beam_search(model.ctc(encoded), golden.BEAM_SIZE)
    tokens, chosen = [hypothesis.tokens for hypothesis in hypotheses], None
    if model.config.decoder != "none":
        left, right = model.rescore(encoded, tokens)
        backward = golden.WEIGHTS["reverse_weight"] if model.config.bidirectional else 0
        first = golden.WEIGHTS["ctc_weight"] * np.array([hypothesis.score for hypothesis in hypotheses])
        chosen = int(np.argmax((1 - backward) * left + backward * right + first))
    return [tokens, [hypothesis.times for hypothesis in hypotheses], chosen]


@pytest.mark.parametrize("num", [4, pytest.param(None, marks=pytest.mark.endurance)])
@pytest.mark.parametrize("name", KNOWN)
def test_recordings_whole_and_in_chunks(name, num, export_quickly, tmp_path):
    known = {part: results[:num] for part, results in KNOWN[name].items()}
    checkpoint = write_configuration(name, tmp_path / "checkpoint", blank_bias=golden.BLANK_BIAS)
    bundle = Bundle.open(export_quickly(checkpoint, tmp_path / "bundle"))
    model, recordings = bundle.load(), [golden.features(each, bundle.manifest.features) for each in known["recordings"]]
    assert recordings
    assert [found(model, model.encode(features)) for features in recordings] == known["whole"]
    assert ("chunks" in known) == bundle.manifest.model.streaming
    if "chunks" in known:
        encoded = [model.encode(features, golden.CHUNK_SIZE, golden.NUM_LEFT_CHUNKS) for features in recordings]
        assert [found(model, each) for each in encoded] == known["chunks"]
