"""Damaged files and odd options: a documented error or a result, never a crash, a hang or anything printed."""

import os
from pathlib import Path

import numpy as np
import pytest
from damage import NUM_INPUTS, tried
from damaged_audio import FORMATS, damaged_audio, encoded, use_damaged_audio, use_damaged_media
from damaged_bundles import damage_bundle, use_damaged_bundles
from damaged_configs import damaged_config, use_damaged_configs
from damaged_language_models import use_damaged_models
from odd_options import use_odd_options

from u2moe.runtime import U2moeError

TRAIN_YAMLS = sorted(Path(__file__).parents[1].glob("golden/*/train.yaml"))
FEW = {"audio": 24, "media": 24, "bundles": 12, "options": 12, "models": 40, "configs": 40}
COUNTS = [pytest.param(None, id="few"), pytest.param(NUM_INPUTS, id="many", marks=pytest.mark.endurance)]


@pytest.fixture
def use(request, recognizer, sound, tmp_path):
    """A function that makes an input of a kind from a generator, tries it, and returns what became of it."""
    clip = sound[:8000]
    if request.param == "media":
        pytest.importorskip("av")
        return use_damaged_media(recognizer, [clip], tmp_path)
    return {
        "audio": lambda: use_damaged_audio(recognizer, [clip], tmp_path),
        "bundles": lambda: use_damaged_bundles(recognizer.bundle.path, clip, tmp_path),
        "options": lambda: use_odd_options(recognizer, clip),
        "models": lambda: use_damaged_models(recognizer.vocabulary, tmp_path),
        "configs": lambda: use_damaged_configs(TRAIN_YAMLS, tmp_path),
    }[request.param]()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes in the place of files")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("use", "kind"), [(kind, kind) for kind in FEW], indirect=["use"], ids=list(FEW))
def test_an_input_is_refused_or_used(use, kind, count, tmp_path, capfd):
    documented = (U2moeError, ValueError) if kind == "options" else (U2moeError,)
    outcomes = tried(use, documented, count or FEW[kind], tmp_path)
    assert outcomes["refused"] > 0
    assert outcomes.total() > outcomes["refused"] or kind in ("bundles", "options", "models")
    assert capfd.readouterr().out == ""


def test_inputs_are_made_from_their_seeds(sound):
    texts = [file.read_text(encoding="utf-8") for file in TRAIN_YAMLS]
    files = [encoded(sound[:8000], 16_000, *file_format) for file_format in FORMATS]

    def made(seed):
        random = np.random.default_rng(seed)
        return damaged_audio(files, random), damaged_config(texts, random)

    assert made(1) == made(1) != made(2)


def test_bundles_are_damaged_in_a_copy(bundle, tmp_path):
    before = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    changed = 0
    for seed in range(30):
        target = tmp_path / str(seed)
        damage_bundle(bundle.path, target, np.random.default_rng(seed))
        after = {file.name: file.read_bytes() for file in target.iterdir() if file.is_file()}
        changed += after != before
    assert changed >= 27  # a file may be exchanged for itself
    assert {file.name: file.read_bytes() for file in bundle.path.iterdir()} == before


def test_an_undocumented_error_fails_with_its_seed(tmp_path):
    def use(random):
        raise KeyError

    with pytest.raises(AssertionError, match="seed 0: not a documented error"):
        tried(use, (ValueError,), 1, tmp_path)
