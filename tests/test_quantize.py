"""Quantized bundles: the arithmetic of each function, what must stay float32, errors, reports, gates, intervals."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import soundfile

from u2moe.quantize import RECIPES, Goal, inspect_bundle, quantize_bundle, recipe
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.comparison import compare, share_of
from u2moe.quantize.formats import conversion
from u2moe.quantize.inspection import count_parameters, describe
from u2moe.quantize.passes.halves import MASK, WEIGHT_ERROR, fits_half, half_of, read_single
from u2moe.quantize.recordings import features_of
from u2moe.quantize.report import output_errors
from u2moe.quantize.rounding import Activations
from u2moe.quantize.smoothing import rewritten_bundle
from u2moe.runtime import AudioError, BundleError, BundleWriter, ProviderError, SessionSettings
from u2moe.runtime.cli import main
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.model import TokenScores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clip(tmp_path_factory, sound):
    file = tmp_path_factory.mktemp("clips") / "noise.wav"
    soundfile.write(file, sound[:24_000], 16000)
    return file


def initializers(bundle, read=read_single):
    models = [read(bundle.path / graph.file) for graph in bundle.manifest.model.graphs()]
    return {name: value for model in models for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("name", ["int8", "int8-experts", "int4-experts"])
def test_routers_biases_and_norms_stay_as_they_are(name, bundle, quantized):
    groups = {key: group_of(value) for key, value in initializers(bundle, ir.load).items()}
    before, after = (
        {key: value.const_value.numpy() for key, value in initializers(each).items()}
        for each in (bundle, quantized(name))
    )
    unquantized = ("normalization", "depthwise_convolutions", "routers")
    kept = [key for key in before if key.endswith("bias") or groups[key] in unquantized]
    assert len(kept) > 200
    for key in kept:
        stacked = re.fullmatch(r"(.*\.experts)\.(\d+)\.(w_2\.bias)", key)
        if stacked and name != "int4-experts":  # one tensor contains the second biases of all experts
            found = after[f"{stacked[1]}.{stacked[3]}"][int(stacked[2])]
        elif key not in after:  # the last row of a weight is the bias
            assert key == "encoder.embed.conv.0.bias"
            found = after["encoder.embed.conv.0.weight.rows"][-1]
        else:
            found = after[key]
        is_half = name == "int4-experts" and ".experts." in key
        expected = before[key].astype(np.float16) if is_half else before[key]
        np.testing.assert_array_equal(found, expected, err_msg=key)
    made = conversion("int4" if name == "int4-experts" else "int8")
    experts = [key for key in before if ".experts." in key and key.endswith("weight")]
    assert len(experts) == 9 * 8 * 2
    for key in experts:
        assert key not in after
        parts = [after[f"{key}.{part}"] for part in (made.form.name, *made.others)]
        limit = {8: 0.01, 4: 0.12}[made.form.bits]
        assert relative_error(before[key], made.restored(parts, len(before[key]))) < limit, key


# Errors of the encoder output. Int8 rounds weights and activations to 1/127 of their largest, about 0.4 % each, in
# three blocks; 4-bit weights are off by 8 %. Some router margins of these random weights are smaller, and a changed
# choice of experts adds to the error.
ENCODER_ERROR = {"int8": 0.06, "int8-experts": 0.04, "int4-experts": 0.2, "fp16": 0.03}


@pytest.mark.parametrize("name", sorted(ENCODER_ERROR))
def test_outputs_are_close_to_float32_and_parameters_are_counted(name, bundle, model, quantized, utterances):
    """A token passes through 2 of 8 experts. Blocks of 4 bits are padded."""
    made, hypotheses = quantized(name).load(), [[3, 4, 5], [], list(range(7, 20))]
    for utterance in ("u300", "u131", "u15"):
        expected, found = (each.encode(utterances[utterance]) for each in (model, made))
        assert relative_error(expected, found) < ENCODER_ERROR[name], utterance
        for left, right in zip(model.rescore(expected, hypotheses), made.rescore(expected, hypotheses), strict=True):
            np.testing.assert_allclose(left, right, atol=1.5)
    whole, found, error = count_parameters(bundle), count_parameters(quantized(name)), 0.1 if "int4" in name else 0.001
    assert found == {kind: pytest.approx(number, rel=error) for kind, number in whole.items()}
    assert whole["total"] - whole["active"] == inspect_bundle(bundle.path)["parameters"]["experts"] * 3 // 4
    assert f"active for a token: {found['active']:,}" in describe(inspect_bundle(quantized(name).path))


def test_recipe_is_recorded_and_int4_refused_without_optimisations(bundle, quantized):
    def size(bundle):  # features.onnx has no weights
        return sum(file.size for name, file in bundle.manifest.files.items() if name != "features.onnx")

    stated = quantized("int8").manifest.quantization
    assert (stated["recipe"], stated["num_weights"]["experts"]) == ("int8", 144)
    assert size(quantized("int8")) < 0.35 * size(bundle)
    # Without them, MatMulNBits returns zeros, because onnxruntime does not compute scales at load time
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with pytest.raises(ProviderError, match="4-bit weights need onnxruntime's optimisations"):
        quantized("int4-experts").load(SessionSettings(sess_options=options))


def test_what_several_products_read_is_quantized_once(quantized):
    """Queries and keys of a block, both halves of its GLU, and the projections of positions in all blocks. Native
    kernels recognise the projections by their names (`linear_pos`) and keep their results."""
    graph = ir.load(quantized("int8").path / "encoder.onnx").graph
    read = {node.name: node.inputs[0] for node in graph if node.op_type.startswith("Int8MatMul")}

    def rows_of(name):
        return {rows for product, rows in read.items() if re.search(name, product)}

    for name in (r"encoders\.1/self_attn/linear_(q|kv)/", r"encoders\.1/conv_module/pointwise_conv1/", "/linear_pos/"):
        assert len([product for product in read if re.search(name, product)]) > 1
        assert len(rows_of(name)) == 1
    assert len(rows_of("/linear_q/")) == 3
    quantized_values = [node.inputs[0] for node in graph if node.op_type.startswith("Int8Rows")]
    assert len(quantized_values) == len(set(quantized_values)) == len(set(read.values()))


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(bundle, quantized, exported, clip, tmp_path):
    out, dense, int8 = tmp_path / "out", exported("dense_tiny"), RECIPES["int8"]
    (tmp_path / "foreign").mkdir()
    soundfile.write(tmp_path / "short.wav", np.zeros(160), 16_000)
    short = [Recording(path=tmp_path / "short.wav", transcript="one")]
    silent = [Recording(path=clip, transcript=" - ")]
    no_experts = "quantizes experts, but no graph has such weights"
    for source, changed, options, error, message in (
        (quantized("int8").path, int8, {}, BundleError, "is already quantized"),
        (dense, RECIPES["int8-experts"], {}, BundleError, no_experts),
        (dense, RECIPES["int4-experts"], {}, BundleError, no_experts),
        (dense, recipe("int8", {"experts": "int4"}), {}, BundleError, no_experts),
        (tmp_path / "foreign", int8, {}, BundleError, r"bundle\.json"),
        (bundle.path, int8, {"goal": Goal(max_wer_increase=0.1)}, ValueError, "max_wer_increase needs recordings"),
        (bundle.path, int8, {"goal": Goal(max_wer_increase=0), "recordings": short}, AudioError,
         r"short\.wav and all other recordings are too short for the encoder"),
        (bundle.path, int8, {"goal": Goal(max_wer_increase=0), "recordings": silent}, ValueError,
         "transcripts that contain words"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            quantize_bundle(source, out, changed, **options)
    with pytest.raises(BundleError, match="cannot be quantized in place"):
        quantize_bundle(bundle.path, bundle.path, int8, overwrite=True)
    with pytest.raises(ValueError, match="max_wer_increase must be a number, got nan"):
        quantize_bundle(bundle.path, out, int8, goal=Goal(max_wer_increase=float("nan")))
    assert {file.name for file in tmp_path.iterdir()} == {"foreign", "short.wav"}


@pytest.mark.parametrize(("name", "limit"), [("int8", 10_000), ("fp16", 10**9)])
def test_weights_beside_the_graph(name, limit, small_bundle, monkeypatch, tmp_path):
    """Large graphs keep their weights in a separate file. A second name is refused for weights alone."""
    plain, _ = quantize_bundle(small_bundle.path, tmp_path / "plain", recipe(name))
    separate = tmp_path / "source"
    with BundleWriter(separate) as staging:
        for graph in small_bundle.manifest.model.graphs():
            model = ir.load(small_bundle.path / graph.file)
            ir.save(model, staging.path / graph.file, external_data=f"{graph.file}.data")
        staging.add("tokens.txt", small_bundle.path / "tokens.txt")
        staging.finish(small_bundle.manifest)
    (tmp_path / "again").hardlink_to(separate / "encoder.onnx.data")
    with pytest.raises(BundleError, match=r"encoder\.onnx\.data: has 2 names \(hard links\), expected one"):
        quantize_bundle(separate, tmp_path / "out", recipe(name))
    (tmp_path / "again").unlink()
    (tmp_path / "again").hardlink_to(separate / "tokens.txt")
    monkeypatch.setattr("u2moe.runtime.graph.file.EXTERNAL_DATA_LIMIT", limit)
    bundle, _ = quantize_bundle(separate, tmp_path / "out", recipe(name))
    assert ("encoder.onnx.data" in bundle.manifest.files) == (limit == 10_000)
    features = np.random.default_rng(4).normal(8, 2, (100, 80)).astype(np.float32)
    np.testing.assert_array_equal(bundle.load().encode(features), plain.load().encode(features))


@pytest.mark.parametrize(("owner", "name"), [(ir, "save"), (Activations, "add")])
def test_a_full_disk_is_an_error_that_names_the_bundle(small_bundle, monkeypatch, tmp_path_factory, clip, owner, name):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    folder = tmp_path_factory.mktemp("full")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(BundleError, match="out: cannot be written: No space left on device"):
        quantize_bundle(small_bundle.path, folder / "out", recipe("int8", calibration=[clip] * (owner is Activations)))
    assert list(folder.iterdir()) == []


def test_command_writes_report_and_gate_fails(small_bundle, clip, tmp_path, capsys):
    manifest, out = tmp_path / "list.tsv", tmp_path / "out"
    manifest.write_text(f"{clip}\tone two three\n", encoding="utf-8")
    assert main(["quantize", str(small_bundle.path), str(out), "--list", str(manifest), "--accept-damage"]) == 0
    table, told = capsys.readouterr()
    assert "tokens with unchanged experts" in table
    assert "[1/3] quantizing encoder.onnx" in told
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert 0 < report["weight_error"]["experts"]["relative"] < 0.01
    names = ("0.feed_forward", "0.feed_forward_macaron", "1.feed_forward", "1.feed_forward_macaron")
    assert sorted(report["routing_agreement"]) == [f"encoder.encoders.{name}" for name in names]
    assert 0.9 < min(report["routing_agreement"].values()) <= 1
    assert report["text"]["ctc_greedy, full context"]["num_words"] == 3
    failing = ["quantize", str(small_bundle.path), str(tmp_path / "gated"), "--list", str(manifest)]
    assert main([*failing, "--recipe", "int4-experts", "--max-wer-increase", "-1000"]) == 1
    assert "word error rate rose" in capsys.readouterr().err
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--no-report", "--list", "a.tsv"], "--list names recordings for the report and cannot be combined with"),
    (["--group", "experts=int4", "--group", "experts=int8"], "must name each group at most once, got experts twice"),
    (["--packed", "--recipe", "fp16"], "packed applies only to weights in int8 and int4, but this recipe uses fp16"),
])  # fmt: skip
def test_options_without_use_are_refused(small_bundle, tmp_path, capsys, options, message):
    assert main(["quantize", str(small_bundle.path), str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def changed(source, folder, change):
    def rewrite(models):
        for model in models:
            for name, value in model.graph.initializers.items():
                value.const_value = ir.tensor(change(name, value.const_value.numpy()), name=name)

    return rewritten_bundle(source, folder, rewrite)


def scaled(source, folder, **exponents):
    """Write a bundle with weights scaled by powers of two, named by their last names such as `ctc_lo_weight`."""

    def scale(name, array):
        return array * array.dtype.type(2.0 ** exponents.get("_".join(name.rsplit(".", 2)[-2:]), 0))

    return changed(source, folder, scale)


@pytest.mark.parametrize(("kind", "exponent"), [("fp16", -22), ("int4", -22), ("int4", 22)])
def test_what_half_precision_does_not_hold_stays_float32(kind, exponent, small_bundle, clip, tmp_path):
    up = dict.fromkeys(("after_norm_weight", "after_norm_bias"), exponent)
    source = scaled(small_bundle, tmp_path / "scaled", **up, ctc_lo_weight=-exponent)
    other = "encoder.encoders.1.feed_forward"
    chosen = recipe("fp32", {"output_layers": "int8" if kind == "fp16" else kind})
    chosen = replace(chosen, exceptions={other: "fp16", "ctc.ctc_lo": kind})
    made, _ = quantize_bundle(source.path, tmp_path / "out", chosen)
    (frames,) = features_of(small_bundle, [clip])
    expected, found = (model.ctc(model.encode(frames)) for model in (source.load(), made.load()))
    assert np.abs(expected - found).mean() < (0.01 if kind == "fp16" else 0.5)
    is_lost = kind == "fp16" or exponent > 0  # scales are smaller than weights
    assert made.manifest.quantization.get("beyond_half_precision", []) == ["ctc.ctc_lo"] * is_lost
    assert ("float32 (exceeds half precision): ctc.ctc_lo" in describe(inspect_bundle(made.path))) == is_lost
    names = ir.load(made.path / "encoder.onnx").graph.initializers
    assert any(name.startswith(other) and name.endswith(".half") for name in names)


@pytest.mark.parametrize(("rows", "columns", "expected"), [
    (0, 0, True), (10, -10, True), (-20, 0, False), (0, -20, False), (-12, -12, False),
])  # fmt: skip
def test_rescaled_channels_do_not_hide_what_is_lost(rows, columns, expected):
    weight = np.random.default_rng(0).normal(scale=0.05, size=(64, 48))
    weight[:8] *= 2.0**rows
    weight[:, :8] *= 2.0**columns
    value = ir.Value(name="weight", const_value=ir.tensor(weight.astype(np.float32)))
    assert fits_half(value, WEIGHT_ERROR) == expected


@pytest.mark.parametrize(("layer", "number"), [("ctc.ctc_lo.weight", np.nan), ("encoder.after_norm.weight", np.inf)])
def test_weights_that_are_not_finite_are_named(layer, number, small_bundle, tmp_path, capsys):
    def damage(name, array):
        return np.concatenate([np.full_like(array[:1], number), array[1:]]) if name == layer else array

    source, out = changed(small_bundle, tmp_path / "source", damage), tmp_path / "out"
    assert main(["quantize", str(source.path), str(out), "--no-report"]) == 1
    assert f"{layer.partition('.')[0]}.onnx: has weights that are not finite: {layer}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("graph", "name", "exponents", "on"), [
    ("encoder", "fp16", {"norm_ff_weight": 15}, "noise"),
    ("encoder", "fp16", {"norm_ff_weight": 15}, r"command\.flac"),
    ("ctc", "int8", {"after_norm_weight": 10, "ctc_lo_weight": 124}, "noise"),
    ("decoder", "int4", {"after_norm_weight": 10, "output_layer_weight": 124}, "noise"),
])  # fmt: skip
def test_graphs_that_overflow_are_not_written(graph, name, exponents, on, small_bundle, tmp_path, capsys, monkeypatch):
    source, out = scaled(small_bundle, tmp_path / "source", **exponents), tmp_path / "out"
    if on != "noise":
        monkeypatch.setattr("u2moe.quantize.changes.noise", lambda _: [])
    assert main(["quantize", str(source.path), str(out), "--recipe", name, "--no-report"]) == 1
    assert re.search(rf"{graph}\.onnx on {on}: .*, although all weights of ", capsys.readouterr().err)
    assert not out.exists()


def test_nodes_of_a_graph_in_half_precision_stay_float32_with_such_weights(small_bundle, clip, tmp_path):
    """So do values between two such nodes. Neither weights nor the encoder's output are lost."""
    source = scaled(small_bundle, tmp_path / "scaled", after_norm_weight=-22, after_norm_bias=-22, ctc_lo_weight=22)
    made, _ = quantize_bundle(source.path, tmp_path / "out", RECIPES["fp16"])
    (frames,) = features_of(small_bundle, [clip])
    expected, found = (model.ctc(model.encode(frames)) for model in (source.load(), made.load()))
    assert np.abs(expected - found).mean() < 0.02  # as without scaling
    assert {"ctc.ctc_lo", "encoder.after_norm"} <= set(made.manifest.quantization["beyond_half_precision"])
    stored = ir.load(made.path / "ctc.onnx").graph.initializers
    assert stored["ctc.ctc_lo.weight"].dtype == ir.DataType.FLOAT
    assert stored["ctc.ctc_lo.bias.fp16"].dtype == ir.DataType.FLOAT16


def test_features_end_at_their_limit_and_clipped_weights_are_an_error(small_bundle, clip):
    whole = features_of(small_bundle, [clip])[0]
    assert [len(frames) for frames in features_of(small_bundle, [clip, clip], len(whole) + 20)] == [len(whole), 20]
    (frames,) = features_of(small_bundle, [clip, clip], 30)
    np.testing.assert_array_equal(frames, whole[:30])
    value = ir.Value(name="weight", const_value=ir.tensor(np.array([1e6], np.float32)))
    with pytest.raises(BundleError, match=r"weight: a weight is 1e\+06, but half precision allows at most 65504"):
        half_of(value)
    value.const_value = ir.tensor(np.array([-MASK, 1], np.float32))
    np.testing.assert_array_equal(half_of(value), [-65504, 1])


def test_outputs_of_an_untrained_network_are_compared():
    def untrained(best):
        log_probs = np.full((3, 5000), -np.log(5000), np.float32)
        log_probs[:, 7] += best
        return SimpleNamespace(encode=lambda frames: frames, ctc=lambda _: log_probs)

    found = output_errors(untrained(0.5), untrained(0.25), [np.ones((3, 2), np.float32)])
    assert found["log_probs_mean"] == found["log_probs_max"] == pytest.approx(0.25, abs=1e-5)  # of float32


def scripted(manifest, best, preferred):
    """Return a model with scripted results for features [1, 1], by their number: n-best and the decoders' scores."""

    def ctc(output):
        """Return two frames in which the best token has 60 % and the next 39 %."""
        token, probabilities = best[int(output[0, 0])], np.full((2, manifest.model.vocab_size), 1e-30)
        probabilities[0, [token, token + 1]], probabilities[1, 0] = (0.6, 0.4), 1
        return np.log(probabilities).astype(np.float32)

    def token_scores(output, hypotheses):
        likes = [-1.0 if tokens == [preferred[int(output[0, 0])]] else -9.0 for tokens in hypotheses]
        scores = np.tile(np.array(likes, np.float32)[:, np.newaxis], (1, max(map(len, hypotheses)) + 1))
        return TokenScores(left=scores, right=scores, next=np.zeros((len(hypotheses), 1), np.float32))

    outputs = {"encode": lambda frames: frames, "ctc": ctc, "token_scores": token_scores}
    return SimpleNamespace(manifest=manifest, has_decoder=True, **outputs)


def test_each_model_rescores_its_own_hypotheses(small_bundle):
    """The second pass of a quantized model cannot choose hypotheses that its first pass does not find."""
    features = [np.full((1, 1), number, np.float32) for number in range(3)]
    first = scripted(small_bundle.manifest, [5, 5, 5], [5, 5, 5])
    found = compare(first, scripted(small_bundle.manifest, [5, 8, 5], [5, 5, 6]), features)
    assert found.edits.tolist() == [[0, 0], [1, 1], [0, 1]]
    assert found.tokens.tolist() == [[1, 1]] * 3
    assert found.divergences[0] == 0
    assert found.divergences[1] > found.divergences[2] > 1  # both passes, and only the second
    assert found.data()["changed_texts"] == 2
    assert set(found.passes()) == {"greedy", "second_pass"}


def spread(edits, tokens, **settings):
    return share_of(np.array(edits, float), np.array(tokens, float), **settings)


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 3.689), (1, 0.0253, 5.572), (100, 81.36, 121.6)])
def test_intervals_are_those_of_poisson(count, low, high):
    """Garwood's exact limits, to 1 % of the edits or 0.03. One edit in each recording is not clustered."""
    found = spread([1] * count + [0] * (400 - count), [5] * 400)
    assert found.value == pytest.approx(count / 2000)
    assert 2000 * found.low == pytest.approx(low, rel=0.01, abs=0.03)
    assert 2000 * found.high == pytest.approx(high, rel=0.01)
    assert spread([1], [5], doubt=0.02).high > spread([1], [5]).high


def test_intervals_hold_for_edits_that_come_together():
    """Edits occur in a tenth of the recordings, five on average. In about 2.5 % of cases the upper limit is below the
    truth."""
    random, above, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        edits = random.binomial(1, 0.1, 80) * (1 + random.poisson(4, 80))
        above += spread(edits, [20] * 80).high < 0.1 * 5 / 20
        naive += spread([edits.sum()], [1600]).high < 0.1 * 5 / 20
    assert above <= 0.05 * 400 < naive
    assert spread([3, 0], [9, 9], times=50).high < spread([3, 0], [9, 9]).high
