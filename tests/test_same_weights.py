import json

import numpy as np
import onnx
import pytest
import torch

from u2moe.benchmarks.instruments.workload import utterance
from u2moe.benchmarks.studies.same_weights import GROUPS, MODES, OURS, OURS_FLOAT, TORCH, Peers, run, targets, values
from u2moe.benchmarks.studies.shared.random_models import make_artefact
from u2moe.benchmarks.studies.shared.torch_encoder import LoopedExperts
from u2moe.export.architecture import FeedForward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.arithmetic import relative_error

pytestmark = pytest.mark.slow

PEERS = list(dict.fromkeys(peer for group in GROUPS.values() for peer in group))


@pytest.fixture(scope="session")
def peers(tmp_path_factory):
    return Peers(make_artefact("tiny", tmp_path_factory.mktemp("peers")))


@pytest.fixture(scope="session")
def frames(peers):
    return utterance(peers.bundle)[:400]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_peer_computes_what_ours_does(peers, frames, peer, mode):
    expected = np.concatenate([output[0] for output in peers.one_round(peers.load(OURS_FLOAT), mode, frames)()])
    found = np.concatenate([output[0] for output in peers.one_round(peers.load(peer), mode, frames)()])
    assert len(expected) >= 16
    assert relative_error(expected, found) <= peer.limit


def operators(file):
    model = onnx.load(file, load_external_data=False)
    functions = [node.op_type for function in model.functions for node in function.node]
    return {node.op_type for node in model.graph.node} | set(functions)


def test_every_peer_is_what_it_is_called(peers):
    files = {peer.name: operators(peers.file(peer)) for peer in PEERS if peer != TORCH}
    assert "MoE" in files["contrib MoE"]
    assert {name for name, found in files.items() if "QMoE" in found} == {
        "contrib QMoE 8 bit, the rest ours",
        "contrib QMoE 4 bit, the rest ours",
    }
    masked = files["all experts under a mask"]
    assert "Split" in files["ours, float32"]
    assert not any("Mixture" in name for name in masked)
    inlined = files["quantize_dynamic, matrices"]
    assert "MatMulInteger" in inlined
    assert not any("Mixture" in name for name in inlined)
    assert "ConvInteger" in files["quantize_dynamic, all it can"]
    assert "ConvInteger" not in inlined


def test_the_stock_quantizer_reaches_the_experts(peers):
    by_name = {peer.name: peers.file(peer) for peer in PEERS if peer != TORCH}

    def float_experts(name):
        model = onnx.load(by_name[name])
        weights = [tensor for tensor in model.graph.initializer if ".experts." in tensor.name and len(tensor.dims) == 2]
        return sum(tensor.data_type == onnx.TensorProto.FLOAT for tensor in weights)

    assert float_experts("ours, float32") > 0
    assert float_experts("quantize_dynamic, matrices") == float_experts("quantize_dynamic, all it can") == 0


def test_the_loop_is_ours_to_rounding_even_with_experts_of_no_and_one_token():
    config = FeedForward(kind="moe", hidden=24, activation="swish", bias=True, num_experts=8, num_experts_per_token=2)
    layer = MixtureOfExperts(16, config)
    with torch.inference_mode():
        for num_tokens in (1, 2, 5, 64):
            x = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(num_tokens))
            torch.testing.assert_close(LoopedExperts(layer)(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_second_run_measures_what_is_missing(peers, tmp_path):
    results, root = tmp_path / "peers.json", peers.artefact.folder.parent
    groups = {"torch": (OURS, OURS_FLOAT, TORCH)}
    run(root, results, name="tiny", groups=groups, at_most=1, repetitions=2)
    before = json.loads(results.read_text())["cells"]
    assert list(before) == ["torch/streaming"]
    assert set(before["torch/streaming"]) == {peer.name for peer in groups["torch"]}
    content = run(root, results, name="tiny", groups=groups, repetitions=2)
    assert content["cells"]["torch/streaming"] == before["torch/streaming"]
    assert list(content["cells"]) == ["torch/streaming", "torch/full"]
    assert content["cells"]["torch/full"]["ours, float32"]["relative_error"] == 0
    assert all(len(item["seconds"]) == 2 for measured in content["cells"].values() for item in measured.values())
    assert 0 < content["cells"]["torch/full"][OURS.name]["relative_error"] <= OURS.limit
    assert "| torch eager" in values(content)["table"]
    seconds = content["cells"]["torch/full"][OURS.name]["seconds"]
    again = run(root, results, name="tiny", groups=groups, repetitions=1, more=True)["cells"]
    assert again["torch/full"][OURS.name]["seconds"][:2] == seconds
    assert all(len(item["seconds"]) == 3 for measured in again.values() for item in measured.values())


def cell(peer, peer_seconds):
    ours = {"seconds": [1.0, 2.0, 4.0], "relative_error": 0.01}
    return {OURS.name: ours, peer.name: {"seconds": peer_seconds, "relative_error": 1e-6}}


def made_up():
    cells = {"torch/streaming": cell(TORCH, [3.0, 8.0, 12.0]), "torch/full": cell(TORCH, [2.0, 4.0, 40.0])}
    return {"model": "moe-1b", "cells": cells}


def test_speedups_and_rows():
    found = values(made_up())
    text = found["table"]
    row = next(line for line in text.splitlines() if line.startswith("| torch eager"))
    assert row.endswith("| 1000 (688-1250) | 3.00 (3.00-3.50) | 4000 (3000-22000) | 2.00 (2.00-6.00) | 1.0e-06 |")
    assert "| all experts under a mask | fp32 | not measured |  | not measured |  |  |" in text
    assert (found["own_chunks"], found["torch.streaming"], found["torch.full"]) == ("250", "3.00", "2.00")
    assert "masked.full" not in found


def test_targets_are_of_what_was_measured():
    found = {item.name: item for item in targets(made_up())}
    assert [item.value for item in found.values()] == [3, 2]  # of medians it would be 4 and 2
    streaming, full = found.values()
    assert streaming.name == "ours in int8 faster than torch eager, WeNet's loop over experts (fp32), streaming"
    assert streaming.met
    assert full.row[1:] == ("2 (2-6)", "≥ 3", "**missed** by 33%")
