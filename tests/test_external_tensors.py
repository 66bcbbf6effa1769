import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime import BundleError
from u2moe.runtime.bundle.external_tensors import ExternalTensor, external_tensors

FILE = Path("encoder.onnx")


def tensor(name, location="a.data", shape=(2, 3), data_type=onnx.TensorProto.FLOAT, **entries):
    made = onnx.TensorProto(name=name, dims=shape, data_type=data_type, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        made.external_data.add(key=key, value=str(value))
    return made


def constant(value):
    return onnx.helper.make_node("Constant", [], ["x"], value=value)


def graph(*nodes, initializers=(), **settings):
    return onnx.helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers), **settings)


def found(model):
    return external_tensors(FILE, model.SerializeToString())


def test_an_initializer_with_all_it_says():
    model = onnx.helper.make_model(graph(initializers=[tensor("w", offset=8, length=24)]))
    assert found(model) == [
        ExternalTensor(name="w", location="a.data", offset=8, length=24, data_type=1, shape=(2, 3), is_initializer=True)
    ]


def sparse(values):
    return onnx.SparseTensorProto(values=values, dims=[4])


PLACES = {
    "node": lambda t: onnx.helper.make_model(graph(constant(t))),
    "list": lambda t: onnx.helper.make_model(graph(onnx.helper.make_node("A", [], ["x"], many=[t]))),
    "branch": lambda t: onnx.helper.make_model(
        graph(onnx.helper.make_node("If", ["c"], ["x"], then_branch=graph(initializers=[t]), else_branch=graph()))
    ),
    "function": lambda t: onnx.helper.make_model(
        graph(),
        functions=[onnx.helper.make_function("d", "F", [], ["x"], [constant(t)], [onnx.helper.make_opsetid("", 18)])],
    ),
    "sparse": lambda t: onnx.helper.make_model(graph(sparse_initializer=[sparse(t)])),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_tensor_is(place):
    (only,) = found(PLACES[place](tensor("w")))
    assert (only.name, only.location, only.length, only.is_initializer) == ("w", "a.data", None, False)


def test_tensors_that_are_in_the_graph_are_none():
    inside = onnx.numpy_helper.from_array(np.arange(6.0), "location")  # the word alone is no location
    model = onnx.helper.make_model(graph(initializers=[inside]))
    assert found(model) == []
    model.graph.initializer[0].external_data.add(key="location", value="a.data")  # which DEFAULT makes void
    assert found(model) == []


@given(
    st.lists(
        st.tuples(
            st.text(max_size=5), st.text(max_size=5), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
            st.integers(1, 22), st.integers(-(10**30), 10**30),
        ),
        max_size=4,
    )
)  # fmt: skip
def test_as_onnx_reads_them(items):
    made = [tensor(name, where, shape, kind, offset=offset) for name, where, shape, kind, offset in items]
    model = onnx.helper.make_model(graph(initializers=made))
    assert [(t.name, t.location, t.shape, t.data_type, t.offset) for t in found(model)] == [
        (name, where, tuple(shape), kind, offset) for name, where, shape, kind, offset in items
    ]


@given(data=st.data())
def test_any_damage_is_read_or_a_typed_error(data):
    content = bytearray(PLACES["branch"](tensor("w", offset=1, length=24)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError):
        external_tensors(FILE, bytes(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x3a\x7flocation", "it ends within a field"),
        (b"\x80", "it ends within a number"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "a number of more than 64 bits"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "it ends within a field"),
        (b"\x3b", "a field of wire type 3"),
    ],
)
def test_what_is_no_graph(content, message):
    with pytest.raises(BundleError, match=message):
        external_tensors(FILE, content + b"" if b"location" in content else b"\x0a\x08location" + content)


def field(number, content):
    """A field that holds `content`, as protobuf writes it."""
    length, size = [], len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def test_depth_is_limited():
    content = b"location"
    for _ in range(100):
        content = field(1, field(5, field(6, content)))  # a graph's node's attribute, which is a graph
    with pytest.raises(BundleError, match="more than 100 deep"):
        external_tensors(FILE, field(7, content))
