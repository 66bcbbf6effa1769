"""The bound: counts of products, their parts, the machine's rates, and the resulting times."""

import numpy as np
import onnx
import pytest

from u2moe.benchmarks.bench import bound
from u2moe.benchmarks.bench.expert_usage import measure_experts
from u2moe.benchmarks.instruments import rates
from u2moe.benchmarks.instruments.operators import PARTS, Kernel, call_sites, part_of, profile, read_events
from u2moe.benchmarks.instruments.probe import Mode, Probe
from u2moe.runtime import Bundle

pytestmark = pytest.mark.slow

STREAM = Mode(chunk_size=16, num_left_chunks=4)
NAMES = ("moe_tiny", "dense_tiny", "int8")


@pytest.fixture(scope="module")
def bundles(exported, quantized):
    return {name: Bundle.open(exported(name)) for name in NAMES[:2]} | {"int8": quantized("int8")}


@pytest.fixture(scope="module")
def kernels(bundles, sound):
    return {
        (name, mode): profile(bundles[name], bound.utterance(Probe(bundles[name]), sound, mode), {}, repetitions=2)
        for name in NAMES
        for mode in (Mode(), STREAM)
    }


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_architecture_in_runs_that_are_told_apart(bundles, kernels, sound, name):
    for mode in (Mode(), STREAM):
        # fails if another thread or a warm-up run breaks the order of the profile
        first, second = ([(each.name, each.multiply_adds) for each in own] for own in kernels[name, mode])
        assert first == second
        assert {each.part for each in kernels[name, mode][0]} == set(PARTS)
    encoder, model = bundles[name].manifest.architecture["encoder"], bundles[name].manifest.model
    feed_forward, dim, blocks = encoder["feed_forward"], encoder["dim"], encoder["num_blocks"]
    layer = 2 * dim * feed_forward["hidden"]
    if feed_forward["kind"] == "moe":
        layer = feed_forward["num_experts_per_token"] * layer + dim * feed_forward["num_experts"]
    found = dict.fromkeys(PARTS, 0)
    for each in kernels[name, Mode()][0]:
        found[each.part] += each.multiply_adds
    frames = found["ctc"] // (dim * model.vocab_size)
    assert (frames, found["ctc"] % frames) == (98, 0)  # of four seconds
    # quantized layers may add biases as a small product
    assert 1 <= found["feed_forward"] / (frames * blocks * (1 + encoder["macaron"]) * layer) <= 1.03
    assert found["convolution"] == frames * blocks * (3 * dim * dim + dim * encoder["convolution"]["kernel"])
    # four projections, scores and weighted sums
    assert 1 <= found["attention"] / (frames * blocks * (4 * dim * dim + 2 * frames * dim)) <= 1.5


@pytest.mark.parametrize(("name", "weight_bytes"), [("moe_tiny", 4), ("int8", 1)])
def test_only_experts_with_tokens_are_read(bundles, kernels, sound, name, weight_bytes):
    encoder = bundles[name].manifest.architecture["encoder"]
    size, num_experts = encoder["dim"] * encoder["feed_forward"]["hidden"], encoder["feed_forward"]["num_experts"]
    touched = measure_experts(bundles[name], [sound], [Mode()])["full context"]["touched"]["layers"].values()
    read = [kernel.num_bytes for kernel in kernels[name, Mode()][0] if kernel.part == "feed_forward"]
    assert sum(touched) < len(touched) * num_experts
    assert read.count(size * weight_bytes) == 2 * sum(touched)
    assert max(read) == size * weight_bytes


def event(name, op_type="Add", inputs=(), outputs=(), **arguments):
    shapes = {"input_type_shape": [{kind: shape} for kind, shape in inputs]}
    shapes["output_type_shape"] = [{"float": shape} for shape in outputs]
    return {"name": f"{name}_kernel_time", "dur": 1000, "args": {"op_name": op_type, **shapes, **arguments}}


def test_kernels_of_functions_belong_where_these_are_called(tmp_path):
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 18, "u2moe": 1]>
    main (float[n] x) => (float[n] y)
    { a = u2moe.F(x) b = Relu(a) c = Constant<value = float {1.0}>() y = u2moe.G(b) }
    <domain: "u2moe", opset_import: ["": 18, "u2moe": 1]>
    F (x) => (y) { one = Constant<value = float {1.0}>() g = u2moe.G(x) y = Mul(g, one) }
    <domain: "u2moe", opset_import: ["": 18]>
    G (x) => (y) { a = Abs(x) y = Neg(a) }
    """)
    names = ("encoder/self_attn/f", "encoder/embed/Relu", "c", "encoder/conv_module/g")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    onnx.save(model, tmp_path / "graph.onnx")
    native = call_sites(tmp_path / "graph.onnx", {"G"}.__contains__)
    assert [op_type for op_type, _ in native] == ["F", "Relu", "G", "G", "Mul"]
    sites = call_sites(tmp_path / "graph.onnx", lambda _: False)
    assert [op_type for op_type, _ in sites] == ["F", "Relu", "G", "G", "Mul", "Abs", "Neg", "Abs", "Neg"]
    events = [event(f"n{index}", op_type, node_index=str(index)) for index, (op_type, _) in enumerate(sites)]
    others = ["attention"] * 2 + ["convolution"] * 2 + ["attention"] * 2
    parts = [kernel.part for kernel in read_events(events, sites)]
    assert parts == ["attention", "subsampling", "convolution", *others]
    # an index of another operator is ignored
    assert next(read_events([event("n5", "Sub", node_index="5")], sites)).part == "other"


def test_rates_are_measured_for_what_is_read_and_kernels_belong_where_the_one_before_belongs(monkeypatch):
    names = ["x", "encoder/embed/Conv", "y", "encoder/encoders.3/self_attn/MatMul", "encoder/caches/Concat", "z"]
    found = [kernel.part for kernel in read_events([event(name) for name in names])]
    assert found == ["other", "subsampling", "subsampling", "attention", "other", "other"]
    assert [kernel.part for kernel in read_events([event("x"), event("decoder/left/MatMul")])] == ["decoder"] * 2
    known = map(part_of, ("encoder/something/new", "encoder/position_biases/MatMul", "something"))
    assert list(known) == ["other", "attention", None]
    monkeypatch.setattr(rates, "BEYOND_CACHE", 9_000_000)
    found = rates.measure_rates([5_000_000, 10**12], 1, repetitions=1)
    small, large = found["read_bytes_per_s"]
    assert (int(small), int(large)) == (4 * 1024 * 1024, 8 * 1024 * 1024)
    for kind in ("integer", "float"):
        every = [value["median"] for value in found["multiply_adds_per_s"][kind]["sizes"].values()]
        assert rates.best_rate(found, kind) == max(every) >= min(every) > 0
    for size, nearest in ((6_000_000, small), (10**12, large)):
        assert rates.read_rate(found, size) == found["read_bytes_per_s"][nearest]["median"]


@pytest.mark.parametrize(("op_type", "inputs", "output", "multiply_adds", "num_bytes"), [
    ("MatMul", [("float", [2, 3, 5]), ("float", [5, 7])], [2, 3, 7], 2 * 3 * 5 * 7, 4 * 5 * 7),
    ("MatMul", [("float", [3, 5])], [3, 7], 3 * 5 * 7, 4 * 5 * 7),  # packed earlier
    ("MatMul", [("float16", [3, 5]), ("float16", [5, 7])], [3, 7], 3 * 5 * 7, 2 * 5 * 7),
    ("MatMul", [("float", [2, 3, 5]), ("float", [2, 5, 7])], [2, 3, 7], 2 * 3 * 5 * 7, 4 * 2 * 5 * 7),
    ("FusedMatMul", [("float", [5, 3]), ("float", [5, 7])], [3, 7], 3 * 5 * 7, 4 * 5 * 7),  # left transposed
    ("FusedMatMul", [("float", [3, 5]), ("float", [7, 5])], [3, 7], 3 * 5 * 7, 4 * 5 * 7),  # right transposed
    ("MatMul", [("float", [0, 5]), ("float", [5, 7])], [0, 7], 0, 0),
    ("MatMulIntegerToFloat", [("uint8", [3, 5]), ("int8", [5, 7])], [3, 7], 3 * 5 * 7, 5 * 7),
    ("DynamicQuantizeMatMul", [("float", [3, 5])], [3, 7], 3 * 5 * 7, 5 * 7),
    ("MatMulNBits", [("float", [3, 64])], [3, 7], 3 * 64 * 7, 64 * 7 // 2 + 4 * 2 * 7),
    ("MatMulNBits", [("float", [3, 64]), ("uint8", [7, 2, 32])], [3, 7], 3 * 64 * 7, 64 * 7 + 4 * 2 * 7),
    ("Conv", [("float", [1, 3, 9, 9]), ("float", [4, 3, 3, 3])], [1, 4, 4, 4], 64 * 27, 4 * 4 * 27),
    ("Add", [("float", [3, 5]), ("float", [3, 5])], [3, 5], 0, 0),
])  # fmt: skip
def test_products_are_counted_by_their_shapes(op_type, inputs, output, multiply_adds, num_bytes):
    kernel = next(read_events([event("encoder/x", op_type, inputs, [output])]))
    assert (kernel.multiply_adds, kernel.num_bytes) == (multiply_adds, num_bytes)
    assert kernel.integer is (op_type in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"))


def kernel(part, seconds, op_type="MatMul", **counts):
    return Kernel(name="x", scope=f"encoder/new.7/{op_type}", op_type=op_type, part=part, seconds=seconds, **counts)


RATES = {"integer": 1000.0, "float": 100.0, "read": 10.0}


def test_the_bound_is_the_larger_of_arithmetic_and_reading():
    first = [
        kernel("attention", 1.0, multiply_adds=100, num_bytes=5),
        kernel("feed_forward", 2.0, multiply_adds=100, num_bytes=40, integer=True),
        kernel("feed_forward", 1.0, "Add"),
        kernel("ctc", 0.5, multiply_adds=50, num_bytes=1),
    ]
    slower = [kernel(item.part, 9.0) for item in first]
    found = bound.compare([first, slower, first], {"encoder": [8.5, 8.5, 8.5], "ctc": [1.0, 1.0, 4.0]}, RATES)
    keys = ("arithmetic_s", "read_s", "seconds", "ratio")
    # the profile lacks 4.5 s of the encoder: 1.5 s for each kernel
    assert {part: tuple(item[key] for key in keys) for part, item in found["parts"].items()} == {
        "attention": (1.0, 0.5, 2.5, 2.5),
        "feed_forward": (0.1, 4.0, 6, 1.5),
        "ctc": (0.5, 0.1, 1, 2.0),
    }
    assert found["whole"]["least_s"] == 5.5
    assert found["whole"]["seconds"] == {"median": 9.5, "low": 9.5, "high": 11.0, "count": 3}
    assert found["whole"]["ratio"] == pytest.approx(9.5 / 5.5)
    assert sum(found["operators"].values()) == pytest.approx(1)


@pytest.mark.parametrize(("profiled", "measured", "expected"), [
    ([1, 2, 3], 3, [0, 1, 2]), ([3, 1, 2], 12, [5, 3, 4]), ([1, 1, 10], 8, [0, 0, 8]), ([1, 2, 10], 10, [0, 1, 9]),
    ([5], 2, [2]),
])  # fmt: skip
def test_the_profilers_own_time_is_taken_off_all_kernels_alike(profiled, measured, expected):
    found = bound.without_profiler([kernel("ctc", seconds) for seconds in profiled], [measured, 0, measured])
    assert [item.seconds for item in found] == pytest.approx(expected)


def test_nothing_is_left_out_silently_and_no_product_of_our_graphs(kernels):
    stages = {stage: [1.0] for stage in ("encoder", "ctc", "rescoring")}
    for name in NAMES:
        found = bound.compare(kernels[name, STREAM], stages, RATES)
        assert (found["not_counted"], found["unknown"], set(found["parts"])) == ({}, {}, set(PARTS))
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (3, 8), np.uint8)
    weights = list(random.integers(-127, 128, (2, 8, 8), np.int8))
    expected = (x.astype(np.float32) - 128) @ sum(weight.astype(np.float32) for weight in weights) / 127 * 1e-4
    session = rates.session_of(rates.product_model(rates.KERNELS["integer"], weights), "onnxruntime")
    # float32 sums of 16 products of size 1
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)
    own = [
        kernel("feed_forward", 2.0, "QMoE", parameter_bytes=1 << 20),
        kernel("feed_forward", 1.0, "Novelty", parameter_bytes=1 << 20),
        kernel("attention", 1.0, "MultiHeadAttention"),
        kernel("other", 4.0, multiply_adds=100, num_bytes=1),
        kernel("other", 1.0, "Gather", parameter_bytes=1 << 20),
        kernel("other", 1.0, "Add"),
    ]
    found = bound.compare([own], {"encoder": [10.0]}, RATES)
    assert found["not_counted"] == {"QMoE": 0.2, "Novelty": 0.1, "MultiHeadAttention": 0.1}
    assert found["unknown"] == {"encoder/new.*/MatMul": 0.4}
    assert (found["parts"]["feed_forward"]["ratio"], found["parts"]["other"]["ratio"]) == (None, 6.0)
