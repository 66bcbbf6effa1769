"""Damaged files and invalid options: a documented error or a result, never a crash, a hang or output."""

import os
from pathlib import Path

import pytest
from damage import NUM_INPUTS, tried
from damaged_audio import use_damaged_audio, use_damaged_media, use_damaged_uploads
from damaged_bundles import use_damaged_bundles
from damaged_configs import use_damaged_configs
from damaged_language_models import use_damaged_models
from odd_options import use_odd_options

from u2moe.runtime import U2moeError
from u2moe.runtime.audio.decoder import FileDecoder

TRAIN_YAMLS = sorted(Path(__file__).parents[1].glob("golden/*/train.yaml"))
FEW = {"audio": 24, "media": 24, "uploads": 60, "bundles": 12, "options": 12, "models": 40, "configs": 40}
MANY = {"uploads": 50_000 * NUM_INPUTS // 3000}
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.endurance)]


@pytest.fixture
def use(request, recognizer, sound, tmp_path):
    """Return a function that makes an input of a kind from a generator, uses it, and returns the outcome."""
    clip = sound[:8000]
    if request.param in ("media", "uploads"):
        pytest.importorskip("av")
    decoder = FileDecoder()
    yield {
        "media": lambda: use_damaged_media(recognizer, [clip], tmp_path),
        "uploads": lambda: use_damaged_uploads([clip], recognizer.bundle.manifest.features.sample_rate, decoder),
        "audio": lambda: use_damaged_audio(recognizer, [clip], tmp_path),
        "bundles": lambda: use_damaged_bundles(recognizer.bundle.path, clip, tmp_path),
        "options": lambda: use_odd_options(recognizer, clip),
        "models": lambda: use_damaged_models(recognizer.vocabulary, tmp_path),
        "configs": lambda: use_damaged_configs(TRAIN_YAMLS, tmp_path),
    }[request.param]()
    decoder.stop()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("use", "kind"), [(kind, kind) for kind in FEW], indirect=["use"], ids=list(FEW))
def test_an_input_is_refused_or_used(use, kind, counts, tmp_path, capfd):
    documented = (U2moeError, ValueError) if kind == "options" else (U2moeError,)
    outcomes = tried(use, documented, counts.get(kind, NUM_INPUTS), tmp_path)
    assert outcomes["refused"] > 0
    assert outcomes.total() > outcomes["refused"] or kind in ("bundles", "options", "models")
    assert capfd.readouterr().out == ""


def test_an_undocumented_error_fails_with_its_seed(tmp_path):
    def use(random):
        raise KeyError

    with pytest.raises(AssertionError, match="seed 0: not a documented error"):
        tried(use, (ValueError,), 1, tmp_path)
