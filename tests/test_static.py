"""Bundles of fixed shape against their source bundles."""

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from feeding import OPTIONS, feed, feed_together
from static_damage import DAMAGED_SHAPES, damaged

from u2moe.export import convert_bundle, convert_static, export_sherpa
from u2moe.export.profiles import folding
from u2moe.export.profiles.calibration import damage
from u2moe.export.profiles.conversion import session_of
from u2moe.export.profiles.folding import OPERATORS, check_fixed
from u2moe.export.profiles.graphs import PROFILES
from u2moe.quantize.smoothing import rewritten_bundle
from u2moe.runtime import Bundle, DecodingOptions, Recognizer
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.cli import main
from u2moe.runtime.errors import AudioError, BundleError, ParityError, ProviderError, StreamError, UnsupportedError
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.dispatch import float_mixture
from u2moe.runtime.graph.fixed import fixed_mixture

CHUNKS = {"chunk_size": 16, "num_left_chunks": 2}


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    return convert_static(bundle.path, tmp_path_factory.mktemp("static") / "bundle", **CHUNKS).path


def timed(segments):
    return [(each.tokens, each.text, each.times) for each in segments]


@pytest.mark.parametrize("search", ["attention_rescoring", "attention"])
def test_texts_are_those_of_the_bundle(folder, recognizer, sound, search):
    """In all splits, alone and together with other streams, and if utterances end within a chunk."""
    sound = sound[:34_000]
    fixed, ends = Recognizer.load(folder), DecodingOptions(endpoint=OPTIONS.endpoint, search=search)
    options = dataclasses.replace(ends, **CHUNKS)
    expected = timed(feed(recognizer, sound, [], options))
    assert len(expected) > 1
    assert timed(feed(fixed, sound, [1601] * 20, ends)) == expected
    assert list(map(timed, feed_together(fixed, [sound] * 3, [ends] * 3, step=4000))) == [expected] * 3
    assert timed(fixed.transcribe(sound, 16_000, options=ends).segments) == expected


class Board:
    def __init__(self, folder, change=lambda outputs: outputs):
        self.session, self.change, self.num_calls = onnxruntime.InferenceSession(folder / "static.onnx"), change, 0
        self.stated = json.loads((folder / "static.json").read_text())

    def run(self, inputs):
        shapes = {each["name"]: tuple(each["shape"]) for each in self.stated["inputs"]}
        assert {name: array.shape for name, array in inputs.items()} == shapes
        assert all(array.dtype == np.float32 for array in inputs.values())
        self.num_calls += 1
        names = [each["name"] for each in self.stated["outputs"]]
        return self.change(dict(zip(names, self.session.run(None, inputs), strict=True)))


@pytest.mark.parametrize(("change", "told"), [
    (lambda found: found | {"log_probs": found["log_probs"][:, :3]}, r"output log_probs: found float32 \[1, 3, "),
    (lambda found: found | {"r_att_cache": found["r_att_cache"].astype(np.float16)}, "r_att_cache: found float16"),
    (lambda found: {"output": found["output"]}, "output log_probs: found nothing"),
    (lambda found: list(found.values()), "static: found list, expected a dict of outputs by name"),
])  # fmt: skip
def test_outputs_of_a_runner_are_recognised_and_checked(folder, sound, change, told):
    board = Board(folder)
    recognizer = Recognizer.load(folder, runner=board)
    assert recognizer.transcribe(sound, 16_000).text == Recognizer.load(folder).transcribe(sound, 16_000).text
    assert board.num_calls > 5
    assert recognizer.model.providers == ("Board",)
    with pytest.raises(ProviderError, match=told):
        Recognizer.load(folder, runner=Board(folder, change)).transcribe(sound, 16_000)


OTHERS = (
    "efficient_conformer_stream_three_rates", "e_branchformer_moe", "squeezeformer", "rope_gqa_moe", "shaw_moe",
    "stack_n_frames_whisper_positions",
)  # fmt: skip
"""Encoders with frame rates, caches, attention and positions that the golden networks lack."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("multiple", "left"), [pytest.param(1, 3, marks=pytest.mark.endurance), (5, 1)])
def test_other_encoders(name, multiple, left, exported, tmp_path):
    bundle = Bundle.open(exported(name))
    size = multiple * bundle.manifest.model.chunk_multiple
    written = convert_static(bundle.path, tmp_path / "static", chunk_size=size, num_left_chunks=left)
    assert {item.tensor for item in written.report.comparisons} > {"log_probs", "output", "r_att_cache"}
    graph = onnxruntime.InferenceSession(tmp_path / "static" / "static.onnx")
    assert all(isinstance(axis, int) for value in graph.get_inputs() + graph.get_outputs() for axis in value.shape)


def test_a_wrong_weight_is_found(small_bundle, tmp_path, monkeypatch):
    folded = folding.folded

    def damaged(model):
        result = folded(model)
        for name, value in result.graph.initializers.items():
            if name == "encoder.encoders.1.conv_module.pointwise_conv2.weight":
                value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=name)
        return result

    monkeypatch.setattr("u2moe.export.profiles.static_graph.folded", damaged)
    with pytest.raises(ParityError, match="stream from position 0, last chunk of 1: output: largest difference"):
        convert_static(small_bundle.path, tmp_path / "static")
    assert not any(tmp_path.iterdir())


def test_what_cannot_have_a_fixed_shape(bundle, quantized, folder, exported, tmp_path):
    def refused(source, told, **options):
        with pytest.raises((UnsupportedError, ValueError, AudioError), match=told):
            convert_static(source, tmp_path / "static", **options)
        assert not (tmp_path / "static").exists()

    refused(quantized("int8").path, "quantization: weights are .*int8.*needs a float32 bundle")
    refused(folder, r"model\.static: graphs of fixed shape: convert the source bundle")
    for profile in PROFILES:
        with pytest.raises(UnsupportedError, match="fixed shape"):
            convert_bundle(folder, tmp_path / "static", profile)
    with pytest.raises(UnsupportedError, match="fixed shape"):
        export_sherpa(folder, tmp_path / "static")
    refused(bundle.path, "num_left_chunks must be", num_left_chunks=0)
    refused(bundle.path, "chunk_size must be at least 1", chunk_size=0)
    refused(bundle.path, "qdq requires recordings", qdq=True)
    refused(bundle.path, "none.wav", recordings=["none.wav"])
    for name, told in (
        ("not_causal", "model.streaming: this encoder was trained for full context"),
        ("learned_positions", "encoder/embed/.*: learned positions do not allow a fixed shape"),
    ):
        refused(exported(name), told)


def one_output(shape, build, weights=None):
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=shape)
    g = GraphBuilder("one")
    y = build(g, x, *(g.tape.initializer(ir.tensor(array, name=name)) for name, array in (weights or {}).items()))
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT) if weights else None
    graph = ir.Graph([x], [y], nodes=g.tape.nodes, initializers=g.tape.initializers, opset_imports={"": 18, "u2moe": 1})
    return ir.Model(graph, ir_version=8, functions=list(g.functions.values()))


SIZES = ((1, 1), (2, 1), (3, 2), (4, 4), (5, 3), (6, 4), (7, 1), (9, 7), (33, 4))  # experts, and experts per token


@pytest.mark.parametrize(("num_experts", "top_k", "bias", "common"), [
    *((*size, True, 1e6) for size in SIZES), (8, 2, True, 0.0), (8, 2, False, 0.0), (8, 2, False, 1e6),
])  # fmt: skip
def test_mixture_without_choosing(num_experts, top_k, bias, common):
    """All experts as one layer yield the output of the chosen ones; a common part of the logits causes no rounding."""
    random = np.random.default_rng(num_experts * 10 + top_k)
    shapes = {"w1": (6, 5), "w1_bias": (5,), "w2": (5, 6), "w2_bias": (6,)}
    shapes = {name: shape for name, shape in shapes.items() if bias or not name.endswith("bias")}
    experts = {f"e{expert}_{name}": shape for expert in range(num_experts) for name, shape in shapes.items()}
    shapes = {"gate": (6, num_experts), **experts}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    shared = weights | {"gate": weights["gate"] + np.float32(common)}
    weights["gate"] = shared["gate"] - np.float32(common)  # as it was rounded
    mixture = Mixture(num_experts=num_experts, top_k=top_k, activation="swish", bias=bias)
    x = random.standard_normal((1, 7, 6)).astype(np.float32)
    outputs = []
    for build, arrays in (
        (lambda g, x, *own: g.call(float_mixture(mixture), x, *own)[0], weights),
        (lambda g, x, gate, *own: fixed_mixture(g, mixture, x, gate, own), shared),
    ):
        content = ir.to_proto(one_output(x.shape, build, arrays)).SerializeToString()
        outputs.append(onnxruntime.InferenceSession(content).run(None, {"x": x})[0])
    assert np.abs(outputs[1] - outputs[0]).max() < 2e-5


@pytest.mark.parametrize(("nodes", "told"), [
    (lambda g, x: g.op("Cast", x, to=ir.DataType.FLOAT16), r"node Cast \(Cast\): NPU compilers do not support"),
    (lambda g, x: g.op("Add", x, 1e6), r"node Add \(Add\): .* 1e\+06, which exceeds the float16 limit .65504."),
    (lambda g, x: g.op("Add", x, float("nan")), r"node Add \(Add\): .* has the value nan"),
    (lambda g, x: g.op("Unsqueeze", x, [0, 1]), r"node Unsqueeze \(Unsqueeze\): .* at most 4 axes, all fixed"),
])  # fmt: skip
def test_what_compilers_refuse_is_named(nodes, told):
    with pytest.raises(UnsupportedError, match=told):
        check_fixed(folding.folded(one_output((1, 2, 3), nodes)), "odd")


def test_graph_is_plain_and_other_chunks_refused(folder, bundle):
    model = ir.load(folder / "static.onnx")
    assert model.graph.opset_imports == {"": 17}
    assert not model.functions
    assert {node.op_type for node in model.graph} <= OPERATORS
    assert sum(node.name.startswith("encoder/encoders.0/") for node in model.graph) > 20
    stated = json.loads((folder / "static.json").read_text())
    assert {name for name in stated["float"] if "/router/" in name} <= {node.name for node in model.graph}
    assert (stated["window"], stated["hop"], stated["left_frames"], stated["experimental"]) == (67, 64, 32, False)
    assert np.load(folder / stated["first_caches"]["cnn_cache"]).any()
    recognizer = Recognizer.load(folder)
    for options in (DecodingOptions(chunk_size=8), DecodingOptions(chunk_size=16, num_left_chunks=3)):
        with pytest.raises(StreamError, match="only chunk_size 16 and num_left_chunks 2, got"):
            recognizer.create_stream(options)
    with pytest.raises(ValueError, match="runner needs a bundle of fixed shape"):
        bundle.load(runner=recognizer.model.encoder.runner)


@pytest.mark.parametrize(("file", "change", "told"), DAMAGED_SHAPES)
def test_damaged_folders(folder, file, change, told, tmp_path):
    with pytest.raises(BundleError, match=told[0]):
        Bundle.open(damaged(folder, tmp_path / "damaged", file, change)).load()


def test_command(small_bundle, tmp_path, capsys):
    arguments = [str(small_bundle.path), str(tmp_path / "out"), "--profile", "static", "--num-left-chunks", "2"]
    assert main(["convert", *arguments]) == 0
    assert "static.onnx" in capsys.readouterr().out
    assert Bundle.open(tmp_path / "out").manifest.model.static.num_left_chunks == 2


def test_quantized_for_qnn(small_bundle, clips, tmp_path, monkeypatch):
    files = sorted(clips.glob("*.wav"))
    monkeypatch.setattr("u2moe.export.profiles.static.EXPERIMENTAL", 1000)

    def make_uneven(models):
        for name, value in (item for model in models for item in model.graph.initializers.items()):
            if ".experts." in name and name.endswith("w_1.weight"):
                columns = np.geomspace(0.1, 1, value.shape[1], dtype=np.float32)
                value.const_value = ir.tensor(value.const_value.numpy() * columns, name=name)

    source = rewritten_bundle(small_bundle, tmp_path / "uneven", make_uneven)
    written = convert_static(source.path, tmp_path / "out", **CHUNKS, recordings=files, qdq=True)
    stated = json.loads((written.path / "static.json").read_text())
    assert stated["experimental"]
    folder, inputs = written.path / "calibration", {each["name"]: each["shape"] for each in stated["inputs"]}
    rows = [line.split() for line in (folder / "dataset.txt").read_text().splitlines()]
    assert stated["calibration"] == len(rows) > 5
    for index, (name, shape) in enumerate(inputs.items()):
        stacked = np.load(folder / f"{name}.npy")
        assert stacked.shape == (len(rows), *shape[1:])
        assert all((np.load(folder / row[index]) == own).all() for row, own in zip(rows, stacked, strict=True))
    assert not np.load(folder / rows[0][list(inputs).index("att_cache")]).any()
    assert np.load(folder / rows[1][list(inputs).index("att_cache")]).any()
    model = ir.load(written.path / "static_qdq.onnx")
    for name, value in model.graph.initializers.items():
        assert not name.endswith("_quantized") or "feed_forward" in name, name
        if name.endswith("_quantized") and len(value.shape) > 1:
            is_narrow = "/experts/Concat/" in name or "/experts/Concat_3/" in name
            assert value.dtype == (ir.DataType.UINT8 if is_narrow else ir.DataType.INT16), name
            zero = model.graph.initializers[name.replace("_quantized", "_zero_point")].const_value.numpy()
            assert not is_narrow or np.abs(value.const_value.numpy() - zero.astype(int)).max(axis=0).min() > 80, name
    scales = [value for name, value in model.graph.initializers.items() if name.endswith("router/Softmax_scale")]
    assert min(value.const_value.numpy() for value in scales) * 65535 > 1  # a margin over weights of experts
    routers = [node for node in model.graph if "/router/" in node.name and node.op_type == "Clip"]
    assert routers
    assert not any(node.inputs[0].producer().op_type == "DequantizeLinear" for node in routers)
    assert stated["damage"]["mean_cosine"] > 0.99
    assert stated["damage"]["same_best_tokens"] > 0.8
    graph, sample = written.path / "static.onnx", {name: np.load(folder / f"3_{name}.npy") for name in inputs}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(written.path / "static_qdq.onnx", options).run(["log_probs"], sample)[0]
    # The optimisations of `session_of` must not round the activations again.
    assert np.abs(session_of(written.path / "static_qdq.onnx")(sample)["log_probs"] - exact).max() < 0.01
    unchanged = damage(graph, graph, [sample], ["one two", "three"], ["one", "three"])
    exact = dict.fromkeys(("least_cosine", "mean_cosine", "same_best_tokens"), 1)
    assert unchanged == pytest.approx({**exact, "different_words": 1 / 3})
