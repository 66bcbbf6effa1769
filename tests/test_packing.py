"""Bundles packed for native kernels: equal results, weights used from the file, clear errors elsewhere."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import soundfile
from manifests import edited

from u2moe.benchmarks.bench.plan import Plan, run_suite
from u2moe.benchmarks.bench.terminal import describe
from u2moe.quantize import quantize_bundle, recipe
from u2moe.runtime import Bundle, BundleError, KernelsError, SessionSettings
from u2moe.runtime.bundle import contract
from u2moe.runtime.cli import main
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.model.native import installed_kernels

pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)


def outputs(bundle):
    model = bundle.load(SessionSettings(kernels="native"))
    features = np.random.default_rng(0).normal(10, 3, (120, model.config.feature_size)).astype(np.float32)
    encoder_out = model.encode(features)
    scores = model.rescore(encoder_out, [[5, 6], [7]])
    return [encoder_out, model.encode(features, 4, 2), model.ctc(encoder_out), *scores]


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "name"), [
    ("small", "int4"),
    ("gated", "int8"),
    pytest.param("gated", "int4", marks=pytest.mark.endurance),
])  # fmt: skip
def test_the_same_to_the_last_bit(exported, tmp_path, checkpoint, name):
    kept, made = {"encoder.encoders.0.self_attn": "fp16"}, []
    for is_packed in (False, True):
        chosen = dataclasses.replace(recipe(name, packed=is_packed), exceptions=kept)
        made.append(quantize_bundle(exported(checkpoint), tmp_path / str(is_packed), chosen)[0])
    plain, packed = made
    weights = ir.load(packed.path / "encoder.onnx").graph.initializers.items()
    halves = [name for name, value in weights if value.const_value.dtype == ir.DataType.FLOAT16]
    assert halves
    assert all(name.startswith("encoder.encoders.0.self_attn.") for name in halves)
    for one, other in zip(outputs(plain), outputs(packed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert packed.manifest.quantization[contract.PACKED] == installed_kernels().layout


@pytest.fixture(scope="module")
def packed(small_bundle, sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    (folder / "sounds").mkdir()
    soundfile.write(folder / "sounds" / "noise.wav", sound[:16_000], 16000)
    arguments = [str(small_bundle.path), str(folder / "bundle"), "--packed", "--list", str(folder / "sounds")]
    assert main(["quantize", *arguments]) == 0
    return Bundle.open(folder / "bundle")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mapped files")
def test_weights_are_used_where_they_lie_and_a_removed_bundle_stays_loaded(packed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(packed.path, copy)
    model = Bundle.open(copy).load()  # whose weights are mapped while it lives
    assert model.kernels.native
    assert str(copy / "encoder.onnx.data") in Path("/proc/self/maps").read_text(encoding="utf-8")
    features = np.random.default_rng(0).normal(10, 3, (200, 80)).astype(np.float32)
    before = model.encode(features)
    shutil.rmtree(copy)
    assert np.array_equal(model.encode(features), before)


def test_without_native_kernels_it_is_an_error_that_says_so(packed, monkeypatch):
    with pytest.raises(KernelsError, match=r"encoder\.onnx: weights are packed for native kernels, but onnxruntime"):
        packed.load(SessionSettings(kernels="onnxruntime"))
    monkeypatch.setitem(sys.modules, "u2moe_kernels", None)
    installed_kernels.cache_clear()
    try:
        for use in (
            lambda: packed.load(SessionSettings(kernels="auto")),
            lambda: quantize_bundle(packed.path, packed.path.parent / "other", recipe("int8", packed=True)),
        ):
            with pytest.raises(KernelsError, match=r"pip install \./runtime/kernels"):
                use()
    finally:
        installed_kernels.cache_clear()


def test_another_layout_is_refused_by_name(packed, tmp_path):
    shutil.copytree(packed.path, tmp_path / "later")
    edited("quantization", **{contract.PACKED: 99})(tmp_path / "later")
    message = rf"packed in layout 99, but u2moe-kernels \S+ reads layout {installed_kernels().layout}: quantize"
    with pytest.raises(KernelsError, match=message):
        Bundle.open(tmp_path / "later").load()


@pytest.mark.slow
def test_the_report_counts_packed_files_and_nothing_to_pack_is_an_error(packed, small_bundle, tmp_path):
    sizes = {name: file.size for name, file in packed.manifest.files.items()}
    report = json.loads((packed.path / "report.json").read_text(encoding="utf-8"))
    assert report["bytes"]["files"]["after"] == sum(sizes.values()) - sizes["report.json"]
    plain = recipe("fp32", {"embeddings": "int8"}, packed=True)
    with pytest.raises(BundleError, match=r"with recipe fp32\[embeddings=int8\], native kernels use none"):
        quantize_bundle(small_bundle.path, tmp_path / "plain", plain)
    assert not (tmp_path / "plain").exists()


@pytest.mark.slow
def test_inspect_shows_the_layout_and_packed_bundles_are_measured_without_a_bound(packed, tmp_path, sound, capsys):
    soundfile.write(tmp_path / "noise.wav", sound[:16_000], 16000)
    plan = Plan(threads=(1,), chunk_sizes=(16,), left_chunks=(4,), repetitions=1, paced_s=0)
    report = run_suite({"packed": packed}, [Recording(path=tmp_path / "noise.wav", transcript="")], plan)
    assert report["without_bound"] == ["packed"]
    assert report["bound"] == report["rates"] == []
    assert report["experts"]["packed"]
    assert "no bound for packed: products of packed weights cannot be counted" in describe(report)
    assert main(["inspect", str(packed.path)]) == 0
    assert f"native kernels' layout {installed_kernels().layout}" in capsys.readouterr().out
    assert (packed.path / "encoder.onnx.data").stat().st_size > 50_000
