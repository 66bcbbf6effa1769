"""Several sessions with native kernels: in threads, after a fork, and released in any order."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from manifests import with_activation

from u2moe.benchmarks.instruments.workload import speech
from u2moe.quantize.inspection import describe, inspect_bundle
from u2moe.runtime import Bundle, KernelsError, Recognizer, SessionSettings
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.native import CPU, choose_kernels
from u2moe.runtime.text.word_errors import WordErrors

pytest.importorskip("u2moe_kernels", reason="u2moe-kernels is not installed", exc_type=ImportError)

SHAPE = (1024, 2048)


@pytest.mark.slow
def test_texts_are_about_those_of_onnxruntime_and_streams_leave_no_bit_behind():
    """Float sums differ in the last bits, so some activations are rounded to another integer."""
    native, alone = (Recognizer.from_pretrained(kernels=kernels) for kernels in ("native", "onnxruntime"))
    assert native.model.kernels.native
    errors = WordErrors()
    for clip in find_audio([DEMO_FOLDER / "clips"]):
        errors.add(alone.transcribe(clip).text, native.transcribe(clip).text)
    assert errors.num_words > 10
    assert errors.rate < 0.25
    # Kernels keep projected positions. A model that has encoded with other contexts still equals a new one
    features = Bundle.open(DEMO_FOLDER).manifest.features
    frames = fbank(speech(6.0, features.sample_rate), features)
    contexts = [(16, 4), (None, -1), (5, 2), (16, -1), (1, 3)]

    def encoded(model, context):
        return model.encode(frames, chunk_size=context[0], num_left_chunks=context[1])

    expected = [encoded(Recognizer.from_pretrained(kernels="native").model, context) for context in contexts]
    used = Recognizer.from_pretrained(kernels="native").model
    for context, one in [*zip(contexts, expected, strict=True)] * 2:
        np.testing.assert_array_equal(encoded(used, context), one)


def test_a_function_that_the_kernels_cannot_run_leaves_the_others_native(quantized, tmp_path, monkeypatch, caplog):
    """An activation of a later version is an example. onnxruntime runs the function's body."""
    bundle = quantized("int8")
    later = with_activation(bundle, "cube", tmp_path / "later")
    monkeypatch.delenv("U2MOE_KERNELS", raising=False)
    with caplog.at_level("INFO", "u2moe"):
        loaded = Recognizer.load(later.path).model
    *others, last = ACTIVATIONS
    reason = f"attribute activation must be {', '.join(others)} or {last}, got 'cube'"
    assert loaded.kernels.native
    assert loaded.kernels.refused == {"Int8MixtureOfExperts of encoder": reason}
    assert str(loaded.kernels).endswith(f"; not native: Int8MixtureOfExperts of encoder ({reason})")
    assert f"kernels: {loaded.kernels}" in caplog.text
    frames = np.random.default_rng(0).normal(10, 3, (60, bundle.manifest.model.feature_size)).astype(np.float32)
    found, expected = (each.encode(frames) for each in (loaded, bundle.load()))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    shown = describe(inspect_bundle(later.path))
    (native,) = re.findall("^  native  (.*)", shown, re.MULTILINE)
    assert "Int8Linear" in native
    assert re.search(rf"^  onnxruntime  \d x Int8MixtureOfExperts: {reason}$", shown, re.MULTILINE)
    with pytest.raises(KernelsError, match=r"encoder\.onnx.*Int8MixtureOfExperts: attribute activation"):
        later.load(SessionSettings(kernels="native"))


def resident(file):
    """Return the resident bytes of a mapped file, or None if it is not mapped."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.findall(rf"{re.escape(str(file))}\nSize:.*?\nRss: +(\d+) kB", text, re.DOTALL)
    return sum(map(int, found)) << 10 if found else None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_packed_leaves_the_memory_of_the_file(tmp_path):
    """The file may then change, because it is not read again."""
    random = np.random.default_rng(0)
    values = {
        "weight": random.integers(-127, 128, SHAPE, np.int8),
        "scale": random.uniform(0.5, 1, SHAPE[1]).astype(np.float32),
    }
    x, y = (ir.val(name, dtype=ir.DataType.FLOAT, shape=("n", size)) for name, size in zip("xy", SHAPE, strict=True))
    weights = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in values.items()]
    node = ir.Node("u2moe", "Int8Linear", [x, *weights], {"activation": ir.AttrString("activation", "")}, outputs=[y])
    opsets = {"": 18, "u2moe": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=weights, opset_imports=opsets, name="one")
    ir.save(ir.Model(graph, ir_version=8), tmp_path / "one.onnx", external_data="one.data")
    options = onnxruntime.SessionOptions()
    choose_kernels("native", [CPU]).register(options)
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", options)
    assert resident(tmp_path / "one.data") == 0
    rows = random.standard_normal((3, SHAPE[0]), np.float32)
    before = session.run(None, {"x": rows})[0]
    os.truncate(tmp_path / "one.data", 0)
    np.testing.assert_array_equal(session.run(None, {"x": rows})[0], before)
