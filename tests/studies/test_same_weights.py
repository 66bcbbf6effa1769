"""The same weights by other means compute the same, on a tiny model."""

import json

import onnx
import pytest
import torch

from u2moe.benchmarks.instruments.workload import utterance
from u2moe.benchmarks.studies import same_weights
from u2moe.benchmarks.studies.same_weights import MODES, OURS_FLOAT, PEERS, STOCK, TORCH, Encoders, joined
from u2moe.benchmarks.studies.shared.torch_encoder import LoopedExperts
from u2moe.export.architecture import FeedForward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.arithmetic import relative_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("same_weights")


@pytest.fixture(scope="module")
def encoders(root):
    return Encoders(root, "tiny")


@pytest.mark.endurance
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.key)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_peer_computes_what_ours_does(encoders, peer, mode):
    frames = utterance(encoders.bundle)[:400]
    expected = joined(encoders.one_round(encoders.load(OURS_FLOAT), mode, frames))
    found = joined(encoders.one_round(encoders.load(peer), mode, frames))
    assert len(expected) >= 16
    assert relative_error(expected, found) <= peer.limit


@pytest.mark.endurance
def test_every_peer_is_what_it_is_called(encoders):
    operators = {}
    for peer in PEERS:
        if peer != TORCH:
            model = onnx.load(encoders.file(peer))
            nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
            operators[peer.key] = {node.op_type for node in nodes}
            experts = [
                item
                for item in model.graph.initializer
                if ".experts." in item.name and "bias" not in item.name and len(item.dims) == 2
            ]
            floats = sum(item.data_type == onnx.TensorProto.FLOAT for item in experts)
            assert (floats > 0) == (peer == OURS_FLOAT), peer.key
    assert {key for key, found in operators.items() if "QMoE" in found} == {"qmoe8"}
    assert "MatMulInteger" in operators[STOCK.key]


def test_the_loop_is_ours_to_rounding_even_with_experts_of_no_and_one_token():
    config = FeedForward(kind="moe", hidden=24, activation="swish", bias=True, num_experts=8, num_experts_per_token=2)
    layer = MixtureOfExperts(16, config)
    with torch.inference_mode():
        for num_tokens in (1, 2, 5, 64):
            x = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(num_tokens))
            torch.testing.assert_close(LoopedExperts(layer)(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.endurance
def test_the_report_of_the_command(encoders, root, tmp_path, capsys):
    results = tmp_path / "results.json"
    same_weights.main([str(root), "--model", "tiny", "--results", str(results)])
    content = json.loads(results.read_text())
    assert content["modes"]["full"]["float32"]["error"] == 0
    shown = same_weights.values(content)
    assert shown["table"] in capsys.readouterr().out
    assert shown["int8.full"] == "1.00"
    assert len(list(same_weights.targets(content))) == 2
