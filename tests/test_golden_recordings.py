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


@pytest.fixture(
    scope="module",
    params=[
        *((name, 4) for name in KNOWN),
        *(pytest.param((name, None), marks=pytest.mark.endurance) for name in KNOWN),
    ],
    ids=str,
)
def heard(request, tmp_path_factory, export_quickly):
    """A bundle, its recordings or the first of them as features, and what WeNet found in them."""
    name, num = request.param
    folder, known = tmp_path_factory.mktemp(name), {part: found[:num] for part, found in KNOWN[name].items()}
    checkpoint = write_configuration(name, folder / "checkpoint", blank_bias=golden.BLANK_BIAS)
    bundle = Bundle.open(export_quickly(checkpoint, folder / "bundle"))
    return bundle, [golden.features(number, bundle.manifest.features) for number in known["recordings"]], known


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


def test_recordings_whole_and_in_chunks(heard):
    bundle, recordings, known = heard
    model = bundle.load()
    assert recordings
    assert [found(model, model.encode(features)) for features in recordings] == known["whole"]
    assert ("chunks" in known) == bundle.manifest.model.streaming
    if "chunks" in known:
        encoded = [model.encode(features, golden.CHUNK_SIZE, golden.NUM_LEFT_CHUNKS) for features in recordings]
        assert [found(model, each) for each in encoded] == known["chunks"]
