"""Kinds of subsampling and positions that the golden bundles lack: int8, and weights that matter."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.comparison import LIMIT
from u2moe.export.random_checkpoint import random_config, write_random_checkpoint
from u2moe.quantize import quantize_bundle, recipe
from u2moe.runtime import Bundle, SessionSettings, UnsupportedError
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.session import Session

pytestmark = pytest.mark.slow

EXPERTS = {"mlp_type": "moe", "n_expert": 2, "n_expert_activated": 1}
ROPE = {"pos_enc_layer_type": "rope_pos", "selfattention_layer_type": "rope_abs_selfattn"}
NETWORKS = {
    "rope_linear": {"encoder_conf": {**ROPE, "input_layer": "linear", **EXPERTS}},
    "shaw_stack": {"encoder_conf": {"selfattention_layer_type": "shaw_rel_selfattn", "input_layer": "stack_n_frames"}},
    "no_pos_conv2d2": {"encoder_conf": {"pos_enc_layer_type": "no_pos", "input_layer": "conv2d2"}},
    "whisper_conv1d2": {
        "encoder": "transformer",
        "encoder_conf": {"pos_enc_layer_type": "abs_pos_whisper", "input_layer": "conv1d2"},
    },
}
ROUNDING = 0.15
"""Limit for int8: root mean square error relative to the deviation of the output, in networks of random weights."""


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, export_quickly, tmp_path_factory):
    """The network in torch and its bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(folder / "checkpoint", random_config(**NETWORKS[request.param]), seed=1)
    bundle = Bundle.open(export_quickly(folder / "checkpoint", folder / "bundle"))
    return Checkpoint.open(folder / "checkpoint").network(), bundle


@pytest.fixture(scope="module")
def features():
    return (3 * np.random.default_rng(5).standard_normal((150, 80)) + 11).astype(np.float32)


def expected(network, features):
    with torch.inference_mode():
        return network.encoder(torch.from_numpy(features).unsqueeze(0), torch.tensor([len(features)]))[0][0].numpy()


def test_int8_is_near(exported, features, tmp_path):
    network, bundle = exported
    quantized, _ = quantize_bundle(bundle.path, tmp_path / "int8", recipe("int8"))
    wanted, found = expected(network, features), quantized.load().encode(features)
    assert found.shape == wanted.shape
    assert 0 < np.sqrt(np.mean((found - wanted) ** 2)) < ROUNDING * wanted.std()


def test_each_weight_of_these_layers_counts(exported, features, tmp_path):
    """One value moves by a third of the tensor's largest value."""
    network, bundle = exported
    wanted, config = expected(network, features), bundle.manifest.model
    graph = ir.load(bundle.path / "encoder.onnx")
    names = [name for name in graph.graph.initializers if name.startswith("encoder.embed.") or "rel_k_embed" in name]
    assert len(names) >= 4
    assert np.abs(bundle.load().encode(features) - wanted).max() < LIMIT
    for name in names:
        value = graph.graph.initializers[name]
        original = value.const_value
        array = original.numpy().copy()
        array.flat[array.size // 2] += np.abs(array).max() / 3
        value.const_value = ir.tensor(array, name=name)
        ir.save(graph, tmp_path / "encoder.onnx")
        value.const_value = original
        session = Session(tmp_path / "encoder.onnx", config.graphs()[0], bundle.manifest, SessionSettings())
        assert np.abs(Encoder(session, config).whole(features) - wanted).max() > LIMIT, name


@pytest.mark.parametrize(
    ("network", "table", "kind"),
    [("rope_linear", torch.ones(1, 9, 4, 2), "rope_pos"), ("no_pos_conv2d2", torch.ones(1, 9, 32), "no_pos")],
)
def test_other_tables_of_positions_are_refused(network, table, kind, tmp_path):
    write_random_checkpoint(tmp_path, random_config(**NETWORKS[network]))
    state = torch.load(tmp_path / "final.pt", weights_only=True)
    torch.save({**state, "encoder.embed.pos_enc.pe": table}, tmp_path / "final.pt")
    with pytest.raises(UnsupportedError, match=f"encoder.embed.pos_enc.pe .* is not the sinusoid table .*{kind}"):
        Checkpoint.open(tmp_path)
