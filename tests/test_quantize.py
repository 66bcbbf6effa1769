"""Quantized bundles: the arithmetic of each function, what must stay float32, errors, reports, and gates."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from u2moe.benchmarks.quality.gpu import main as cuda_check
from u2moe.quantize import RECIPES, Recipe, convolutions, experts, functions, quantize_bundle, quantizer, recipe
from u2moe.quantize.arithmetic import from_int4_blocks, int4_blocks, int8_columns, int8_rows, relative_error
from u2moe.runtime import Bundle, BundleError, BundleWriter, QuantizationError, contract
from u2moe.runtime.cli import main

MATRICES = arrays(
    np.float32,
    st.tuples(st.integers(1, 70), st.integers(1, 9)),
    elements=st.floats(-100, 100, width=32),
)


@pytest.fixture(scope="module")
def float32(exported):
    return Bundle.open(exported("moe_tiny"))


@pytest.fixture(scope="module")
def quantized(float32, tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name], _ = quantize_bundle(float32.path, tmp_path_factory.mktemp("quantized") / name, recipe(name))
        return made[name]

    return make


@pytest.fixture(scope="module")
def clip(tmp_path_factory, sound):
    file = tmp_path_factory.mktemp("clips") / "noise.wav"
    soundfile.write(file, sound, 16000)
    return file


def initializers(bundle):
    return {
        name: value.const_value.numpy()
        for graph in bundle.manifest.model.graphs()
        for name, value in ir.load(bundle.path / graph.file).graph.initializers.items()
    }


# --- arithmetic


@given(MATRICES)
def test_int8_is_within_half_a_step_and_symmetric(weight):
    integers, scale = int8_columns(weight)
    assert integers.min() >= -127
    assert (np.abs(integers * scale - weight) <= scale * 0.501).all()
    negated, _ = int8_columns(-weight)
    np.testing.assert_array_equal(negated, -integers)


@given(MATRICES)
def test_int8_rows_are_columns_of_the_transpose(weight):
    integers, scale = int8_rows(weight)
    assert scale.shape == (len(weight), 1)
    assert (np.abs(integers * scale - weight) <= scale * 0.501).all()


@settings(deadline=None)
@given(MATRICES, st.sampled_from([16, 32, 64]))
def test_int4_is_at_least_as_good_as_plain_rounding(weight, block_size):
    packed, scale = int4_blocks(weight, block_size)
    restored = from_int4_blocks(packed, scale, len(weight))
    blocks = -(-len(weight) // block_size)
    padded = np.zeros((blocks * block_size, weight.shape[1]), np.float32)
    padded[: len(weight)] = weight
    steps = np.abs(padded.reshape(blocks, block_size, -1)).max(axis=1, keepdims=True) / 7
    plain = np.where(
        steps > 0, np.rint(padded.reshape(blocks, block_size, -1) / np.where(steps > 0, steps, 1)) * steps, 0
    )
    plain = plain.reshape(padded.shape)[: len(weight)]
    assert relative_error(weight, restored) <= relative_error(weight, plain) * (1 + 1e-5) + 1e-6


# --- recipes


def test_recipes_are_checked_at_birth():
    with pytest.raises(ValueError, match=r"routers.*always fp32"):
        Recipe(name="x", groups={"routers": "int8"})
    with pytest.raises(ValueError, match="attention must be one of fp32, int8, got 'int4'"):
        Recipe(name="x", groups={"attention": "int4"})
    with pytest.raises(ValueError, match="quantizes nothing"):
        Recipe(name="x", groups={"attention": "fp32"})
    with pytest.raises(ValueError, match="block_size"):
        Recipe(name="x", groups={"experts": "int4"}, block_size=20)
    with pytest.raises(ValueError, match="exclude"):
        Recipe(name="x", groups={"experts": "int4"}, whole="fp16")
    with pytest.raises(ValueError, match="recipe must be one of"):
        recipe("int7")
    with pytest.raises(ValueError, match="skip_expert_below must be from 0 to 1, got 2"):
        recipe("int8", skip_expert_below=2)
    with pytest.raises(ValueError, match="'fp32' quantizes nothing"):
        recipe("fp32")
    assert recipe("int8", skip_expert_below=0.25).name == "int8[skip_expert_below=0.25]"
    assert recipe("fp32", {"experts": "int4"}).quantized == {"experts": "int4"}
    assert recipe("int8") is RECIPES["int8"]
    changed = recipe("int8", {"attention": "fp32"})
    assert changed.name == "int8[attention=fp32]"
    assert "attention" not in changed.quantized


# --- functions against numpy


def session_of(chain, inputs, initial, dtype=np.float32):
    """An onnxruntime session of calls in a row, each on what the one before gave, and the last on the constants too."""
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    fed = [ir.val(name, dtype=kind, shape=(None,) * rank) for name, rank in inputs.items()]
    weights = []
    for name, array in initial.items():
        tensor = ir.tensor(array, name=name)
        weights.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
    y = ir.val("y", dtype=kind, shape=None)
    calls, values = [], fed
    for function in chain[:-1]:
        values = [ir.val(output.name) for output in function.outputs]
        calls.append(ir.Node(function.domain, function.name, calls[-1].outputs if calls else fed, outputs=values))
    calls.append(ir.Node(chain[-1].domain, chain[-1].name, [*values, *weights], outputs=[y]))
    opsets = {"": functions.OPSET, contract.MOE_DOMAIN: 1, functions.CONTRIB: 1}
    graph = ir.Graph(fed, [y], nodes=calls, initializers=weights, opset_imports=opsets, name="one")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = ir.Model(graph, ir_version=8, functions=chain)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def rounded_rows(x, least=1e-20):
    """What is left of activations after quantization, one scale per row, of values of at least `least`."""
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), least)
    return np.clip(np.rint(x / peak * 127), -128, 127) / 127 * peak


def test_int8_matmul_is_what_it_says():
    random = np.random.default_rng(0)
    x = (random.standard_normal((3, 5, 24)) * random.lognormal(0, 2, (3, 5, 1))).astype(np.float32)
    x[1, 2] = 0
    integers, scale = int8_columns(random.standard_normal((24, 7)).astype(np.float32))
    session = session_of(
        [functions.int8_rows(), functions.int8_matmul()], {"x": 3}, {"weight": integers, "scale": scale}
    )
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, rounded_rows(x) @ (integers * scale), rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])


@pytest.mark.parametrize("kind", sorted(functions.LOWEST))
def test_int8_rows_of_an_activation_are_searched_for_the_largest_value_alone(kind):
    """The same as of any rows, but where all values are so small that the lowest that there can be would not fit."""
    random = np.random.default_rng(4)
    x = ACTIVATIONS[kind](torch.from_numpy(random.standard_normal((2, 5, 24)).astype(np.float32))).numpy()
    integers, scale = int8_columns(random.standard_normal((24, 7)).astype(np.float32))
    weights = {"weight": integers, "scale": scale}
    found, known = (
        session_of([rows, functions.int8_matmul()], {"x": 3}, weights)
        for rows in (functions.int8_rows(), functions.int8_rows(kind))
    )
    np.testing.assert_array_equal(known.run(None, {"x": x})[0], found.run(None, {"x": x})[0])
    small = ACTIVATIONS[kind](torch.from_numpy(0.1 * random.standard_normal((1, 5, 24)).astype(np.float32))).numpy()
    expected = rounded_rows(small, functions.LOWEST[kind] or 1e-20) @ (integers * scale)
    np.testing.assert_allclose(known.run(None, {"x": small})[0], expected, rtol=2e-3, atol=1e-4)


ACTIVATIONS = {"relu": torch.relu, "swish": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
               "tanh": torch.tanh, "selu": torch.selu, "hardtanh": torch.nn.functional.hardtanh}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in plain numpy, token by token."""

    gate: np.ndarray
    top_k: int
    act: object
    weights: dict
    biases: dict
    """By "w1" and "w2", [experts, out]."""
    skip_below: float = 0.0
    least_hidden: float = 1e-20
    """The smallest peak that the hidden activations of a token are rounded with."""

    def shares(self, token):
        """The weight of each expert of a token, in their order, without those that are skipped."""
        logits = token @ self.gate
        chosen = np.argsort(-logits, kind="stable")[: self.top_k]
        shares = np.exp(logits[chosen] - logits.max())
        shares /= shares.sum()
        kept = shares >= min(self.skip_below, shares[0])
        return dict(zip(chosen[kept], shares[kept] / shares[kept].sum(), strict=True))

    def said_of(self, tokens, *, rounded):
        """[tokens, dim] for tokens of that shape; with activations as they are, or rounded to integers."""
        rows = rounded_rows if rounded else lambda x, _=0: x
        result = np.zeros_like(tokens)
        for row, token in enumerate(tokens):
            for expert, share in self.shares(token).items():
                hidden = rows(token[np.newaxis])[0] @ self.weights[f"e{expert}_w1"] + self.biases["w1"][expert]
                hidden = self.act(torch.from_numpy(hidden.astype(np.float32))).numpy()[np.newaxis]
                hidden = rows(hidden, self.least_hidden)[0]
                result[row] += share * (hidden @ self.weights[f"e{expert}_w2"] + self.biases["w2"][expert])
        return result


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("top_k", "skip_below"), [(2, 0.1), (2, 0.3), (2, 0.5), (3, 0.34), (3, 1.0)])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int4"])
def test_experts_below_the_limit_are_skipped_and_the_others_weighted_anew(kind, top_k, skip_below, has_bias):
    """Against plain numpy; experts say so much that one too many or a wrong weight would show."""
    random, (dim, hidden, num_experts) = np.random.default_rng(2), (32, 64, 4)
    gate = random.standard_normal((dim, num_experts)).astype(np.float32) * 0.2
    shapes = {"w1": (dim, hidden), "w2": (hidden, dim)}
    floats = {f"e{expert}_{part}": random.standard_normal(shape).astype(np.float32)
              for expert in range(num_experts) for part, shape in shapes.items()}  # fmt: skip
    biases = {part: has_bias * random.standard_normal((num_experts, shape[1])).astype(np.float32)
              for part, shape in shapes.items()}  # fmt: skip
    options = {"has_bias": has_bias, "skip_below": skip_below}
    if kind == "int8":
        function = experts.int8_mixture_of_experts(num_experts, top_k, "swish", **options)
    elif kind == "int4":
        sizes = experts.Int4Sizes(dim=dim, hidden=hidden, block_size=16)
        function = experts.int4_mixture_of_experts(num_experts, top_k, "swish", sizes, **options)
    else:
        half = kind == "fp16"
        function = experts.float_mixture_of_experts(num_experts, top_k, "swish", half=half, **options)
    initial, restored = {"gate": gate}, {}
    for name in [value.name for value in function.inputs][2:]:
        expert, _, part = name.partition("_")
        if name == "w2_bias":
            initial[name] = biases["w2"]
        elif part.endswith("bias"):
            initial[name] = biases[part[:2]][int(expert[1:])].astype(np.float16 if kind == "fp16" else np.float32)
        elif kind == "int8" and not part.endswith("scale"):
            initial[name], initial[f"{name}_scale"] = int8_columns(floats[name])
            restored[name] = initial[name] * initial[f"{name}_scale"]
        elif kind == "int4" and not part.endswith("scale"):
            initial[name], scale = int4_blocks(floats[name], 16)
            initial[f"{name}_scale"] = scale.ravel()
            restored[name] = from_int4_blocks(initial[name], scale, len(floats[name]))
        elif not part.endswith("scale"):
            initial[name] = floats[name].astype(np.float16) if kind == "fp16" else floats[name]
            restored[name] = floats[name]
    initial = {value.name: initial[value.name] for value in list(function.inputs)[1:]}
    dtype = np.float16 if kind == "fp16" else np.float32
    session = session_of([function], {"x": 3}, initial, dtype=dtype)
    x = random.standard_normal((2, 40, dim)).astype(dtype)
    x[0, 3] = 0  # weights of experts are all alike
    found = session.run(None, {"x": x})[0]

    layer = Experts(gate=gate, top_k=top_k, act=torch.nn.functional.silu, weights=restored, biases=biases)
    skipped = dataclasses.replace(layer, skip_below=skip_below)
    tokens = x.reshape(-1, dim).astype(np.float32)
    num_kept = sum(len(skipped.shares(token)) for token in tokens)
    assert len(tokens) <= num_kept < top_k * len(tokens)
    limit = {"fp32": 1e-5, "fp16": 3e-3, "int8": 3e-3, "int4": 1e-2}[kind]
    rounded = kind in ("int8", "int4")  # MatMulNBits rounds blocks of a row, which is finer
    expected = skipped.said_of(tokens, rounded=rounded)
    assert relative_error(expected, found.reshape(-1, dim)) < limit
    assert relative_error(layer.said_of(tokens, rounded=rounded), found.reshape(-1, dim)) > 2 * limit
    np.testing.assert_allclose(session.run(None, {"x": x[:, :4]})[0], found[:, :4], rtol=1e-3, atol=1e-3)
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, dim)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("kind", sorted(functions.ACTIVATIONS))
def test_int8_experts_are_those_the_router_chose(kind, num_experts, top_k, has_bias):
    """Against plain numpy, expert by expert; experts differ so much that a wrong one would show."""
    random = np.random.default_rng(1)
    gate = random.standard_normal((16, num_experts)).astype(np.float32)
    names = experts.int8_moe_parameters(num_experts, has_bias=has_bias)[2:]
    initial = {"gate": gate}
    biases = {part: np.zeros((num_experts, size), np.float32) for part, size in (("w1", 12), ("w2", 16))}
    if has_bias:
        biases = {part: random.standard_normal(bias.shape).astype(np.float32) for part, bias in biases.items()}
    for name in names:
        if name.endswith("w1_bias"):
            initial[name] = biases["w1"][int(name[1 : name.index("_")])]
        elif name == "w2_bias":
            initial[name] = biases["w2"]
        elif not name.endswith("scale"):
            expert, part = int(name[1 : name.index("_")]), name.split("_")[1]
            shape = (16, 12) if part == "w1" else (12, 16)
            weight = (random.standard_normal(shape) * (1 + expert)).astype(np.float32)
            initial[name], initial[f"{name}_scale"] = int8_columns(weight)
    initial = {"gate": gate, **{name: initial[name] for name in names}}
    function = experts.int8_mixture_of_experts(num_experts, top_k, kind, has_bias=has_bias)
    session = session_of([function], {"x": 3}, initial)
    x = random.standard_normal((2, 9, 16)).astype(np.float32)
    x[1, 4] = 0
    found = session.run(None, {"x": x})[0]

    weights = {name: initial[name] * initial[f"{name}_scale"] for name in initial if name[-2:] in ("w1", "w2")}
    layer = Experts(
        gate=gate,
        top_k=top_k,
        act=ACTIVATIONS[kind],
        weights=weights,
        biases=biases,
        least_hidden=functions.LOWEST.get(kind, 0) or 1e-20,
    )
    expected = layer.said_of(x.reshape(-1, 16), rounded=True)
    # one step of an activation that lies on the edge of rounding is 1/127 of its row's peak
    assert relative_error(expected, found.reshape(-1, 16)) < 3e-3
    np.testing.assert_array_equal(session.run(None, {"x": x[:, :4]})[0], found[:, :4])
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, 16)


@pytest.mark.parametrize("kind", sorted(functions.LOWEST))
def test_no_activation_is_lower_than_what_its_rows_are_quantized_for(kind):
    """The integers of a row reach as far below zero as above it: what is lower would be cut off."""
    lowest = float(ACTIVATIONS[kind](torch.linspace(-20, 1, 200_001, dtype=torch.float64)).min())
    assert functions.LOWEST[kind] - 1e-3 < -lowest <= functions.LOWEST[kind]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 3)])
@pytest.mark.parametrize("time", [7, 8, 12, 23])
def test_int8_convolution_is_a_convolution(kernel, stride, time):
    random = np.random.default_rng(2)
    x = np.abs(random.standard_normal((2, time, 19, 6))).astype(np.float32)
    x[1, :kernel] = 0
    weight = random.standard_normal((8, 6, kernel, kernel)).astype(np.float32)
    bias = random.standard_normal(8).astype(np.float32)
    integers, scale = int8_columns(weight.transpose(2, 3, 1, 0).reshape(-1, 8))
    session = session_of(
        [convolutions.int8_convolution(kernel, stride)], {"x": 4}, {"weight": integers, "scale": scale, "bias": bias}
    )
    found = session.run(None, {"x": x})[0]
    channels_first = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = torch.relu(
        torch.nn.functional.conv2d(channels_first, torch.from_numpy(weight), torch.from_numpy(bias), stride)
    )
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    assert relative_error(expected, found) < 0.015
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])


@pytest.mark.parametrize(("first", "second"), [((3, 2), (3, 2)), ((3, 2), (5, 3)), ((5, 1), (2, 1))])
@pytest.mark.parametrize("time", [11, 12, 13, 31])
def test_int8_first_convolutions_are_convolutions(first, second, time):
    random = np.random.default_rng(3)
    x = random.standard_normal((2, time, 21)).astype(np.float32)
    x[1] *= 1e-3
    weights = [random.standard_normal(shape).astype(np.float32)
               for shape in ((6, 1, first[0], first[0]), (8, 6, second[0], second[0]))]  # fmt: skip
    biases = [random.standard_normal(size).astype(np.float32) for size in (6, 8)]
    integers, scale = int8_columns(weights[1].transpose(2, 3, 1, 0).reshape(-1, 8))
    windows = [convolutions.Window(kernel=kernel, stride=stride) for kernel, stride in (first, second)]
    session = session_of(
        [convolutions.int8_first_convolutions(21, 6, *windows)],
        {"x": 3},
        {
            "first_weight": np.vstack((weights[0].reshape(6, -1).T, biases[0])),
            "weight": integers,
            "scale": scale,
            "bias": biases[1],
        },
    )
    found = session.run(None, {"x": x})[0]
    expected = torch.from_numpy(x).unsqueeze(1)
    for weight, bias, (_, stride) in zip(weights, biases, (first, second), strict=True):
        expected = torch.relu(
            torch.nn.functional.conv2d(expected, torch.from_numpy(weight), torch.from_numpy(bias), stride)
        )
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert found.shape == expected.shape
    assert relative_error(expected, found) < 0.015
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], found[:1])
    frame = first[1] * second[1]  # input frames from one output frame to the next
    np.testing.assert_array_equal(session.run(None, {"x": x[:, :-frame]})[0], found[:, :-1])
    np.testing.assert_array_equal(session.run(None, {"x": x[:, frame:]})[0], found[:, 1:])


def test_int8_first_convolutions_that_see_nothing_positive_give_the_bias():
    window = convolutions.Window(kernel=3, stride=2)
    weights = {"first_weight": -np.ones((10, 4), np.float32), "weight": np.ones((36, 5), np.int8)}
    weights |= {"scale": np.ones(5, np.float32), "bias": np.arange(-2, 3, dtype=np.float32)}
    session = session_of([convolutions.int8_first_convolutions(9, 4, window, window)], {"x": 3}, weights)
    found = session.run(None, {"x": np.ones((1, 7, 9), np.float32)})[0]
    np.testing.assert_array_equal(found, np.broadcast_to(np.maximum(weights["bias"], 0), (1, 1, 1, 5)))


# --- bundles


@pytest.mark.parametrize("name", ["int8", "int8-experts", "int4-experts"])
def test_routers_biases_and_norms_stay_as_they_are(name, float32, quantized):
    before, after = initializers(float32), initializers(quantized(name))
    groups = ("normalization", "depthwise_convolutions", "routers")
    kept = [key for key in before if key.endswith("bias") or contract.weight_group(key) in groups]
    assert len(kept) > 200
    for key in kept:
        stacked = re.fullmatch(r"(.*\.experts)\.(\d+)\.(w_2\.bias)", key)
        if stacked and name != "int4-experts":  # one tensor holds the second biases of all experts
            found = after[f"{stacked[1]}.{stacked[3]}"][int(stacked[2])]
        elif key not in after:  # rows of one weight, the bias in the last
            assert key == "encoder.embed.conv.0.bias"
            found = after["encoder.embed.conv.0.weight.rows"][-1]
        else:
            found = after[key]
        np.testing.assert_array_equal(found, before[key], err_msg=key)
    suffix = "int4" if name == "int4-experts" else "int8"
    experts = [key for key in before if ".experts." in key and key.endswith("weight")]
    assert len(experts) == 9 * 8 * 2
    for key in experts:
        assert key not in after
        stored, scale = after[f"{key}.{suffix}"], after[f"{key}.scale"]
        if suffix == "int8":
            assert (np.abs(stored * scale - before[key]) <= scale * 0.501).all(), key
        else:
            blocks = scale.reshape(stored.shape[:2])
            assert relative_error(before[key], from_int4_blocks(stored, blocks, len(before[key]))) < 0.12, key


# Errors of the encoder output: int8 rounds weights and activations to 1/127 of their largest, about 0.4 % each, in
# three blocks; 4-bit weights are off by 8 %. Some router margins of these random weights are below that, and a flip
# adds more.
ENCODER_ERROR = {"int8": 0.06, "int8-experts": 0.04, "int4-experts": 0.2, "fp16": 0.03}


@pytest.mark.parametrize("name", sorted(ENCODER_ERROR))
@pytest.mark.parametrize("utterance", ["u300", "u131", "u15"])
def test_outputs_are_close_to_float32(name, utterance, float32, quantized):
    features = np.load(Path(__file__).parent / "golden" / "moe_tiny" / "reference.npz")[f"{utterance}/feats"]
    reference, model = float32.load(), quantized(name).load()
    expected, found = reference.encode(features), model.encode(features)
    assert relative_error(expected, found) < ENCODER_ERROR[name]
    hypotheses = [[3, 4, 5], [], list(range(7, 20))]
    for left, right in zip(reference.rescore(expected, hypotheses), model.rescore(expected, hypotheses), strict=True):
        np.testing.assert_allclose(left, right, atol=1.5)


@pytest.mark.parametrize("name", ["int8", "int8-experts", "int4-experts"])
def test_a_frame_does_not_depend_on_its_chunk_or_batch(name, quantized):
    """One activation scale per token: streams in one batch, and a first chunk with or without what follows, agree."""
    model = quantized(name).load()
    features = np.random.default_rng(3).normal(8, 2, (2, 131, 80)).astype(np.float32)
    alone = [model.encode(row, 16, 4) for row in features]
    np.testing.assert_array_equal(model.encode(features[0, :67], 16, 4), alone[0][:16])
    loud = features.copy()
    loud[1] += 50
    pair, _ = model.encoder.step(loud[:, :67], model.encoder.start(2), required_cache_size=64)
    np.testing.assert_allclose(pair[0], alone[0][:16], atol=1e-5)


def test_recipe_is_recorded_and_bundle_is_smaller(float32, quantized):
    bundle = quantized("int8")
    assert bundle.manifest.quantization["recipe"] == "int8"
    assert bundle.manifest.quantization["num_weights"]["experts"] == 144
    size = {b: sum(file.size for file in b.manifest.files.values()) for b in (float32, bundle)}
    assert size[bundle] < 0.35 * size[float32]


def test_what_several_products_read_is_quantized_once(quantized):
    """Queries and keys of a block, both halves of its GLU, and the projections of positions in all blocks."""
    graph = ir.load(quantized("int8").path / "encoder.onnx").graph
    read = {node.name: node.inputs[0] for node in graph if node.op_type == "Int8MatMul"}

    def rows_of(name):
        return {rows for product, rows in read.items() if re.search(name, product)}

    for name in (r"encoders\.1/self_attn/linear_(q|kv)/", r"encoders\.1/conv_module/pointwise_conv1/", "/linear_pos/"):
        assert len([product for product in read if re.search(name, product)]) > 1
        assert len(rows_of(name)) == 1
    assert len(rows_of("/linear_q/")) == 3
    quantized_values = [node.inputs[0] for node in graph if node.op_type.startswith("Int8Rows")]
    assert len(quantized_values) == len(set(quantized_values)) == len(set(read.values()))


def test_overrides_leave_a_group_alone(float32, tmp_path):
    bundle, _ = quantize_bundle(
        float32.path, tmp_path / "out", recipe("int8", {"subsampling": "fp32", "embeddings": "fp32"})
    )
    names = initializers(bundle)
    assert "encoder.embed.conv.2.weight" in names
    assert "decoder.left_decoder.embed.0.weight" in names
    assert "encoder.encoders.0.self_attn.linear_q.weight.int8" in names


@pytest.mark.parametrize("name", ["fp32", "int8", "int4-experts", "fp16"])
def test_skipped_experts_are_recorded_and_change_little_below_a_low_limit(name, float32, tmp_path, capsys):
    features = np.load(Path(__file__).parent / "golden" / "moe_tiny" / "reference.npz")["u131/feats"]
    outputs = {}
    for limit in (0.001, 0.6):
        out = tmp_path / str(limit)
        arguments = ["--recipe", name, "--skip-expert-below", str(limit), "--no-report", "--quiet"]
        assert main(["quantize", str(float32.path), str(out), *arguments]) == 0
        bundle = Bundle.open(out)
        assert bundle.manifest.quantization["skip_expert_below"] == limit
        graph = ir.load(out / "encoder.onnx")
        assert graph.metadata_props["u2moe.skip_expert_below"] == str(limit)
        mixtures = {node.op_type for node in graph.graph if "MixtureOfExperts" in node.op_type}
        assert [name for name in mixtures if f"_skip{limit}".replace(".", "_") not in name] == []
        outputs[limit] = bundle.load().encode(features)
        assert main(["inspect", str(out)]) == 0
        printed = capsys.readouterr().out
        assert f"quantization: {name}[skip_expert_below={limit}]" in printed
        assert f"u2moe.skip_expert_below = {limit}" in printed
        assert "mixture-of-experts layers: 6 x " in printed
    reference = float32.load().encode(features)
    low = relative_error(reference, outputs[0.001])
    assert low < ENCODER_ERROR.get(name, 0.01)
    assert relative_error(reference, outputs[0.6]) > max(2 * low, 0.1)


def test_nothing_is_recorded_of_experts_where_none_is_skipped(quantized):
    bundle = quantized("int8")
    assert "skip_expert_below" not in bundle.manifest.quantization
    graph = ir.load(bundle.path / "encoder.onnx")
    assert "u2moe.skip_expert_below" not in graph.metadata_props
    assert not any("skip" in function.name for function in graph.functions.values())


def test_networks_without_a_second_expert_cannot_skip_it(exported, tmp_path):
    with pytest.raises(BundleError, match="skips experts, but no token has more than one"):
        quantize_bundle(exported("dense_tiny"), tmp_path / "out", recipe("int8", skip_expert_below=0.2))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(float32, quantized, exported, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BundleError, match="quantized already"):
        quantize_bundle(quantized("int8").path, out, RECIPES["int8"])
    with pytest.raises(BundleError, match="not quantized in place"):
        quantize_bundle(float32.path, float32.path, RECIPES["int8"], overwrite=True)
    with pytest.raises(BundleError, match="quantizes experts, but no graph has such weights"):
        quantize_bundle(exported("dense_tiny"), out, RECIPES["int8-experts"])
    with pytest.raises(BundleError, match="quantizes experts, but no graph has such weights"):
        quantize_bundle(exported("dense_tiny"), out, recipe("int8", {"experts": "int4"}))
    with pytest.raises(ValueError, match="max_wer_increase needs recordings"):
        quantize_bundle(float32.path, out, RECIPES["int8"], max_wer_increase=0.1)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(BundleError, match=r"bundle\.json"):
        quantize_bundle(tmp_path / "foreign", out, RECIPES["int8"])
    assert [file.name for file in tmp_path.iterdir()] == ["foreign"]


@pytest.mark.parametrize("limit", [10_000, 10**9])
@pytest.mark.parametrize("name", ["int8", "fp16"])
def test_weights_beside_the_graph(name, limit, float32, quantized, monkeypatch, tmp_path):
    """Large graphs keep their weights in a file of their own, before and after: the outputs are the same."""
    source = tmp_path / "source"
    with BundleWriter(source) as staging:
        for graph in float32.manifest.model.graphs():
            file = float32.path / graph.file
            ir.save(ir.load(file), staging.path / graph.file, external_data=f"{graph.file}.data")
        staging.add("tokens.txt", float32.path / "tokens.txt")
        staging.finish(float32.manifest)
    monkeypatch.setattr(quantizer, "EXTERNAL_DATA_LIMIT", limit)
    bundle, _ = quantize_bundle(source, tmp_path / "out", recipe(name))
    assert ("encoder.onnx.data" in bundle.manifest.files) == (limit == 10_000)
    features = np.random.default_rng(4).normal(8, 2, (100, 80)).astype(np.float32)
    np.testing.assert_array_equal(bundle.load().encode(features), quantized(name).load().encode(features))


def test_a_full_disk_is_an_error_that_names_the_bundle(float32, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantizer.ir, "save", full)
    with pytest.raises(BundleError, match="out: cannot be written: No space left on device"):
        quantize_bundle(float32.path, tmp_path / "out", RECIPES["int8"])
    assert list(tmp_path.iterdir()) == []


def test_dense_networks_are_quantized_too(exported, tmp_path):
    bundle, _ = quantize_bundle(exported("dense_tiny"), tmp_path / "out", RECIPES["int8"])
    assert bundle.manifest.quantization["num_weights"]["feed_forward"] == 18


def test_command_writes_report_and_gate_fails(float32, clip, tmp_path, capsys):
    manifest = tmp_path / "list.tsv"
    manifest.write_text(f"{clip}\tone two three\n", encoding="utf-8")
    out, saved = tmp_path / "out", tmp_path / "report.json"
    arguments = [
        "quantize",
        str(float32.path),
        str(out),
        "--manifest",
        str(manifest),
        "--report",
        str(saved),
        "--quiet",
    ]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "tokens with unchanged experts" in table
    report = json.loads(saved.read_text(encoding="utf-8"))
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert 0 < report["weight_error"]["experts"]["relative"] < 0.01
    assert set(report["routing_agreement"]) == {
        f"encoder.encoders.{block}.{layer}" for block in range(3) for layer in ("feed_forward_macaron", "feed_forward")
    }
    assert 0.9 < min(report["routing_agreement"].values()) <= 1
    assert report["text"]["ctc_greedy, full context"]["num_words"] == 3

    failing = ["quantize", str(float32.path), str(tmp_path / "gated"), "--manifest", str(manifest), "--quiet"]
    assert main([*failing, "--recipe", "int4-experts", "--max-wer-increase", "-1000"]) == 1
    assert "word error rate rose" in capsys.readouterr().err
    assert not (tmp_path / "gated").exists()


def test_the_check_for_gpus_runs(float32, quantized, clip, capsys):
    """On the CPU here, which computes half precision too: the script must be ready when there is a GPU."""
    fp16 = str(quantized("fp16").path)
    assert cuda_check([str(float32.path), fp16, str(clip), "--provider", "CPUExecutionProvider"]) == 0
    assert "second pass differs by at most" in capsys.readouterr().out


def test_gate_error_carries_the_report(float32, clip, tmp_path):
    from u2moe.runtime.corpus.word_errors import Recording  # noqa: PLC0415

    with pytest.raises(QuantizationError) as caught:
        quantize_bundle(
            float32.path,
            tmp_path / "out",
            RECIPES["int8-experts"],
            recordings=[Recording(path=clip, transcript="one")],
            max_wer_increase=-10,
        )
    assert caught.value.report["bytes"]["ratio"] < 1
