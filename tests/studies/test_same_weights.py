"""Torch, as used by WeNet, computes the same as our runtime, on a tiny model."""

import json

import numpy as np
import pytest
import torch

from u2moe.benchmarks.instruments.workload import utterance
from u2moe.benchmarks.studies import same_weights
from u2moe.benchmarks.studies.same_weights import FLOAT32, INT8, MODES, TORCH, LoopedExperts, encoders, one_round
from u2moe.export.architecture import FeedForward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.arithmetic import relative_error

pytestmark = pytest.mark.slow


@pytest.mark.endurance
def test_all_compute_the_same_and_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(same_weights, "MIXTURE", "tiny")
    monkeypatch.setattr(same_weights, "measure", lambda root, own=same_weights.measure: own(root, "tiny"))
    bundle, own = encoders(tmp_path, "tiny")
    frames = utterance(bundle)[:400]
    for mode in MODES:
        runs = {key: one_round(encoder, mode, frames, bundle) for key, encoder in own.items()}
        found = {key: np.concatenate([output[0] for output in run()]) for key, run in runs.items()}
        assert len(found[FLOAT32]) >= 16
        # sums have a different order
        assert relative_error(found[FLOAT32], found[TORCH]) <= 1e-4
        # activations and weights are rounded, so a router near a tie may choose another expert
        assert 1e-4 < relative_error(found[FLOAT32], found[INT8]) <= 0.06
    results = tmp_path / "results.json"
    same_weights.main([str(tmp_path), "--prepare"])
    same_weights.main([str(tmp_path), "--results", str(results)])
    content = json.loads(results.read_text())
    assert content["modes"]["full"]["float32"]["error"] == 0
    shown = same_weights.values(content)
    assert shown["table"] in capsys.readouterr().out
    assert shown["int8.full"] == "1.00"
    assert len(list(same_weights.targets(content))) == 2


def test_the_loop_is_ours_to_rounding_even_with_experts_of_no_and_one_token():
    config = FeedForward(kind="moe", hidden=24, activation="swish", bias=True, num_experts=8, num_experts_per_token=2)
    layer = MixtureOfExperts(16, config)
    with torch.inference_mode():
        for num_tokens in (1, 2, 5, 64):
            x = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(num_tokens))
            torch.testing.assert_close(LoopedExperts(layer)(x), layer(x), rtol=0, atol=1e-6)
