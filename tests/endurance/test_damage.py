"""Damaged files and invalid options: a documented error or a result, never a crash, a hang or output."""

import os
from pathlib import Path

import pytest
from damage import NUM_INPUTS, tried
from damaged_audio import use_damaged_audio, use_damaged_uploads
from damaged_files import use_damaged_bundles, use_damaged_configs, use_damaged_models
from odd_options import use_odd_options

from u2moe.runtime import U2moeError
from u2moe.runtime.audio.decoder import FileDecoder

FEW = {"audio": 24, "media": 24, "uploads": 60, "bundles": 12, "options": 12, "models": 40, "configs": 40}
MANY = {"uploads": 50_000 * NUM_INPUTS // 3000}
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.endurance)]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", FEW)
def test_an_input_is_refused_or_used(kind, counts, recognizer, sound, tmp_path, capfd):
    clip, decoder = sound[:8000], FileDecoder()
    if kind in ("media", "uploads"):
        pytest.importorskip("av")
    match kind:
        case "audio" | "media":
            use = use_damaged_audio(recognizer, clip, tmp_path / kind, media=kind == "media")
        case "uploads":
            use = use_damaged_uploads(clip, recognizer.bundle.manifest.features.sample_rate, decoder)
        case "bundles":
            use = use_damaged_bundles(recognizer.bundle.path, clip, tmp_path)
        case "options":
            use = use_odd_options(recognizer, clip)
        case "models":
            use = use_damaged_models(recognizer.vocabulary, tmp_path)
        case "configs":
            use = use_damaged_configs(sorted(Path(__file__).parents[1].glob("golden/*/train.yaml")), tmp_path)
    documented = (U2moeError, ValueError) if kind == "options" else (U2moeError,)
    outcomes = tried(use, documented, counts.get(kind, NUM_INPUTS), tmp_path)
    decoder.stop()
    assert outcomes["refused"] > 0
    assert outcomes.total() > outcomes["refused"] or kind in ("bundles", "options", "models")
    assert capfd.readouterr().out == ""


def test_an_undocumented_error_fails_with_its_seed(tmp_path):
    def use(random):
        raise KeyError

    with pytest.raises(AssertionError, match="seed 0: not a documented error"):
        tried(use, (ValueError,), 1, tmp_path)
