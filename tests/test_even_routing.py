import numpy as np
import onnx
import pytest

from u2moe.benchmarks.instruments.workload import random_frames, utterance
from u2moe.benchmarks.studies.shared.even_routing import TurnedSettings, routing, turned_gates
from u2moe.benchmarks.studies.shared.random_models import make_artefact
from u2moe.runtime import Bundle
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(make_artefact("tiny", tmp_path_factory.mktemp("routing")).bundle("int8"))


@pytest.fixture(scope="module")
def frames(bundle):
    return random_frames(bundle)


def touched(bundle, frames, gates):
    found = routing(bundle, frames, gates)
    return found["touched"]["mean"], found["load_entropy"]["mean"]


def test_turned_routers_treat_all_experts_alike(bundle, frames):
    own = touched(bundle, utterance(bundle), {})
    even = touched(bundle, frames, turned_gates(bundle, frames))
    assert own[0] < 7
    assert even[0] > 7.5
    assert even[1] > 0.97 > own[1]


@pytest.mark.parametrize("num_used", [2, 3.5, 6])
def test_turned_routers_leave_as_many_experts_as_wanted(bundle, frames, num_used):
    found = routing(bundle, frames, turned_gates(bundle, frames, num_used))["touched"]
    assert found["mean"] == pytest.approx(num_used, abs=0.2)
    assert len(found["layers"]) == 6
    assert min(found["layers"].values()) >= 2


def test_fewer_experts_than_a_token_needs_cannot_be_had(bundle, frames):
    assert routing(bundle, frames, turned_gates(bundle, frames, 1))["touched"]["mean"] >= 2


def test_a_session_takes_turned_routers_as_if_they_were_in_the_file(bundle, frames, tmp_path):
    gates = turned_gates(bundle, frames, 3)
    settings = TurnedSettings(gates)
    turned = bundle.load(sess_options=settings.options()).encode(frames[:200], 16, 4)
    manifest, graph = bundle.manifest, bundle.manifest.model.graphs()[0]
    model = onnx.load(bundle.path / graph.file)
    for tensor in model.graph.initializer:
        if tensor.name in gates:
            tensor.raw_data = gates[tensor.name].tobytes()
    onnx.save(model, tmp_path / graph.file)
    session = Session(tmp_path / graph.file, graph, manifest, SessionSettings(kernels="onnxruntime"))
    written = Encoder(session, manifest.model)
    np.testing.assert_array_equal(turned, written.chunked(frames[:200], 16, 4))
    assert np.abs(turned - bundle.load(kernels="onnxruntime").encode(frames[:200], 16, 4)).max() > 0.1
