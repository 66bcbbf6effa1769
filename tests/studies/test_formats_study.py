import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.instruments.statistics import NUM_DRAWN, ratio_of_sums
from u2moe.benchmarks.studies.formats import HALF_STEP, Variant, main, recognized, targets, values
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.quantize.recipes import recipe
from u2moe.runtime.corpus.lists import Recording


def test_the_interval_of_a_ratio_is_as_wide_as_recordings_differ():
    others = np.full(400, 2)
    mixed = ratio_of_sums(np.tile([2, 4], 200), others)  # 1.5, with a standard error of 0.5 / 20
    assert (mixed.median, mixed.count) == (1.5, NUM_DRAWN)
    assert mixed.high - mixed.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    errors = np.arange(1, 200)
    found = ratio_of_sums(2 * errors, errors)  # both use the same drawn recordings
    assert (found.low, found.high) == (2, 2)
    with pytest.raises(ValueError, match="the values of the reference sum to 0"):
        ratio_of_sums(np.array([1]), np.array([0]))


def test_noise_is_within_half_a_step_of_16_bits(sound, tmp_path):
    soundfile.write(tmp_path / "one.wav", sound, 16000)
    given = []

    def transcribe(samples, *, options):
        given.append(samples)
        return SimpleNamespace(text="")

    features = SimpleNamespace(sample_rate=16000)
    recognizer = SimpleNamespace(
        transcribe=transcribe, bundle=SimpleNamespace(manifest=SimpleNamespace(features=features))
    )
    for variant in [Variant.parse("bundle@native"), Variant.parse("bundle@native+noise")]:
        assert (variant.folder.name, variant.kernels) == ("bundle", "native")
        recognized(recognizer, [Recording(path=tmp_path / "one.wav", transcript="")], noise=variant.noise)
    assert 0.9 * HALF_STEP < np.abs(given[-1] - given[0]).max() < 1.01 * HALF_STEP


@pytest.mark.slow
def test_variants_are_compared_on_the_same_recordings(exported, sound, tmp_path, capsys):
    soundfile.write(tmp_path / "one.wav", sound, 16000)
    for name, texts in (("words", ("A B", "C")), ("more", ("D",))):
        (tmp_path / f"{name}.tsv").write_text("".join(f"one.wav\t{text}\n" for text in texts), encoding="utf-8")
    quantize_bundle(exported("moe_tiny"), tmp_path / "int8", recipe("int8"))
    variants = [f"{name}={exported('moe_tiny')}@onnxruntime" for name in ("float32", "again")]
    variants.append(f"int8={tmp_path / 'int8'}@onnxruntime")
    manifests = [str(tmp_path / f"{name}.tsv") for name in ("words", "more")]
    main([*variants, "--list", *manifests, "--results", str(tmp_path / "formats.json")])

    results = json.loads((tmp_path / "formats.json").read_text(encoding="utf-8"))
    assert (results["num_recordings"], results["num_words"]) == (3, {"words": 3, "more": 1})
    same, int8 = (results["variants"][name]["modes"]["full context"] for name in ("again", "int8"))
    assert same["beside"]["float32"] == {
        "cost": {"median": 1, "low": 1, "high": 1, "count": NUM_DRAWN}, "num_other_texts": 0, "num_other_words": 0,
    }  # fmt: skip
    assert set(int8["beside"]) == {"float32", "again"}
    shown = values(results)
    assert (shown["recordings"], shown["words"], shown["again.full.float32.texts"]) == ("3", "4", "0%")
    assert shown["table"] in capsys.readouterr().out
    cost, texts = targets(results)
    sums = [
        sum(results["variants"][name]["modes"]["full context"]["num_errors"].values()) for name in ("int8", "float32")
    ]
    assert (cost.found, cost.limit) == (pytest.approx(100 * (sums[0] / sums[1] - 1)), 0.3)
    assert (texts.found, texts.limit) == (pytest.approx(100 * int8["beside"]["float32"]["num_other_texts"] / 3), 7.5)
    assert results["variants"]["int8"]["bytes"] < 0.6 * results["variants"]["float32"]["bytes"]
