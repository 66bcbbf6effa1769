"""Random checkpoints: sizes of the presets, the same bytes for the same seed, healthy activations."""

import pytest
import torch

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import (
    PRESETS,
    num_parameters,
    random_config,
    random_state_dict,
    write_random_checkpoint,
)
from u2moe.export.training_config import parse_training_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("preset", "millions", "active"), [
    ("tiny", 1.24, 0.57), ("dense-225m", 223.5, 223.5), ("moe-1b", 1060.7, 343.1), ("dense-1b", 1061.0, 1061.0),
])  # fmt: skip
def test_sizes_of_the_presets(preset, millions, active):
    config = random_config(**PRESETS[preset])
    assert num_parameters(config) / 1e6 == pytest.approx(millions, rel=0.01)
    assert num_parameters(config, active=True) / 1e6 == pytest.approx(active, rel=0.01)


def test_a_seed_decides_every_value_and_moe_1b_is_dense_225m_with_experts():
    architecture = parse_training_config(random_config()).architecture
    first, again, other = (random_state_dict(architecture, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    name = "encoder.encoders.0.norm_ff.bias"
    assert not torch.equal(first[name], other[name])

    def without_experts(preset):
        config = random_config(**PRESETS[preset])
        for section in ("encoder_conf", "decoder_conf"):
            for key in ("mlp_type", "n_expert", "n_expert_activated"):
                config[section].pop(key, None)
        return config

    assert without_experts("moe-1b") == without_experts("dense-225m")


def test_activations_and_routers_stay_healthy_through_many_blocks(tmp_path):
    """Outputs have size about 1, frames differ, and hardly any expert has no token, after twelve blocks."""
    conf = {"num_blocks": 12, "mlp_type": "moe", "output_size": 64, "linear_units": 96}
    write_random_checkpoint(tmp_path, random_config(encoder_conf=conf))
    network = Checkpoint.open(tmp_path).network()
    routed = []
    for module in network.encoder.modules():
        if isinstance(module, MixtureOfExperts):
            module.register_forward_hook(
                lambda layer, inputs, _: routed.append(layer.route(inputs[0].flatten(0, 1))[0].unique().numel())
            )
    features = torch.rand(1, 400, 80, generator=torch.Generator().manual_seed(0)) * 12 + 5
    with torch.no_grad():
        output, _ = network.encoder(features, torch.tensor([400]))
    assert 0.5 < output.std() < 2
    assert output.std(dim=1).mean() > 0.4 * output.std()
    assert sum(routed) > 0.8 * 8 * len(routed)
