"""Bundles that change on disk during or after loading: a recogniser gets one complete bundle or none."""

import hashlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from manifests import edit_manifest

from u2moe.quantize import quantizer, recipe
from u2moe.runtime import Bundle, BundleError, IntegrityError, Recognizer, SessionSettings
from u2moe.runtime import bundle_folder as bundle_room
from u2moe.runtime.bundle import graph_file
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.graph.file import with_external

pytestmark = pytest.mark.slow

MAPS = Path("/proc/self/maps")
REPLACED = r"was replaced while it was being read: load again"


@pytest.fixture(scope="module")
def beside(small_bundle, tmp_path_factory):
    """Return a bundle with external weights, and another in which each of them differs."""
    result = []
    for factor in (1.0, 1.25):
        with BundleWriter(tmp_path_factory.mktemp("beside") / "bundle") as staging:
            staging.add("tokens.txt", small_bundle.path / "tokens.txt")
            for graph in small_bundle.manifest.model.graphs():
                model = onnx.load(small_bundle.path / graph.file)
                for tensor in model.graph.initializer:
                    array = onnx.numpy_helper.to_array(tensor)
                    if array.dtype == np.float32 and array.ndim > 1:
                        tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(factor), tensor.name))
                place = {"location": f"{graph.file}.data", "size_threshold": 256}
                onnx.save(model, staging.path / graph.file, save_as_external_data=True, **place)
            result.append(staging.finish(with_external(small_bundle.manifest, staging.path)))
    return result


def write(source, target):
    with BundleWriter(target, overwrite=True) as staging:
        for name in source.manifest.files:
            staging.add(name, source.path / name)
        return staging.finish(source.manifest)


@pytest.fixture
def copy(beside, tmp_path):
    return write(beside[0], tmp_path / "copy")


def test_a_bundle_that_is_replaced_while_or_after_it_is_opened_is_refused(beside, copy, monkeypatch):
    """Files are checked again whenever they are read, so that all come from one bundle."""
    opened = Bundle.open(copy.path)
    write(beside[1], copy.path)
    with pytest.raises(IntegrityError, match=rf"encoder\.onnx: {REPLACED}"):
        opened.load()
    read_tokens = bundle_room._read_tokens

    def replaced(files, manifest):
        monkeypatch.undo()
        write(beside[0], copy.path)
        return read_tokens(files, manifest)

    monkeypatch.setattr(bundle_room, "_read_tokens", replaced)
    with pytest.raises(IntegrityError, match=rf"bundle\.json: {REPLACED}"):
        Bundle.open(copy.path)


@pytest.mark.parametrize("verify", [True, False])
def test_files_that_change_between_the_comparison_and_the_session_are_refused(copy, monkeypatch, verify):
    bundle = Bundle.open(copy.path, verify=verify)
    weights = graph_file.GraphFile.weights

    def overwritten(self, operators):
        file = bundle.path / "encoder.onnx.data"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        os.utime(file, ns=(0, 0))
        file.write_bytes(content)
        return weights(self, operators)

    monkeypatch.setattr(graph_file.GraphFile, "weights", overwritten)
    with pytest.raises(IntegrityError, match=rf"encoder\.onnx\.data: {REPLACED}"):
        bundle.load()


def test_each_byte_is_compared_once(beside, monkeypatch):
    num_bytes, total = [], sum(digest.size for digest in beside[0].manifest.files.values())

    def counted(content=b""):
        num_bytes.append(len(content))
        return hashlib.sha256(content)

    counting = types.SimpleNamespace(sha256=counted, file_digest=lambda stream, _: counted(stream.read()))
    monkeypatch.setattr("u2moe.runtime.bundle.files.hashlib", counting)
    for verify in (True, False):
        num_bytes.clear()
        bundle = Bundle.open(beside[0].path, verify=verify)
        assert (sum(num_bytes) == total) == verify
        bundle.load()
        bundle.load()
        assert sum(num_bytes) == total


SURVIVE = """
import os, sys
from pathlib import Path
import numpy as np
from u2moe.runtime import Bundle
from u2moe.runtime.bundle import graph_file

graph_file._SMALL = 0  # otherwise all weights of so small a model are passed to the session

def outputs(model):
    encoder_out = model.encode(np.ones((200, 80), np.float32) * 12)
    return encoder_out, model.ctc(encoder_out), *model.rescore(encoder_out, [[5, 6], [7]])

for damage in (lambda file: os.truncate(file, 0),
               lambda file: file.write_bytes(os.urandom(file.stat().st_size)), Path.unlink):
    folder = Path(sys.argv.pop())
    model = Bundle.open(folder).load()
    before = outputs(model)
    for file in folder.iterdir():
        damage(file)
    print([bool(np.array_equal(*pair)) for pair in zip(before, outputs(model), strict=True)])
"""


def test_a_loaded_recogniser_survives_what_becomes_of_its_files(beside, tmp_path):
    """It runs in a separate process, because reading a mapped file that was shortened kills the process."""
    folders = [str(write(beside[0], tmp_path / name).path) for name in ("shortened", "overwritten", "removed")]
    done = subprocess.run([sys.executable, "-c", SURVIVE, *folders], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[True, True, True, True]\n" * 3), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["int4-experts", "fp16"])
def test_nothing_of_a_loaded_bundle_is_mapped(small_bundle, tmp_path, monkeypatch, name):
    monkeypatch.setattr(graph_file, "_SMALL", 0)
    monkeypatch.setattr("u2moe.runtime.graph.file.EXTERNAL_DATA_LIMIT", 0)
    bundle, _ = quantizer.quantize_bundle(small_bundle.path, tmp_path / "bundle", recipe(name))
    assert (bundle.path / "encoder.onnx.data").is_file()
    recognizer = Recognizer(bundle, bundle.load(SessionSettings(kernels="onnxruntime")))
    assert str(bundle.path) not in MAPS.read_text(encoding="utf-8")
    mapped = bundle.load(SessionSettings(sess_options=onnxruntime.SessionOptions()))  # these cannot take weights
    assert (str(bundle.path) in MAPS.read_text(encoding="utf-8")) == (name != "fp16")
    assert recognizer.model.providers == mapped.providers


def test_a_graph_with_other_external_weights_than_the_manifest_says(copy, tmp_path):
    """Elsewhere (onnxruntime 1.17 would load them from anywhere), or more."""
    model = onnx.load(copy.path / "encoder.onnx", load_external_data=False)
    initializers = model.graph.initializer
    (entry,) = (entry for entry in initializers[0].external_data if entry.key == "location")
    right = entry.value
    for location in ("../encoder.onnx.data", "/etc/passwd", "a/b", "", "..", "ctc.onnx.data", "n" * 200, right):
        entry.value = location
        if location == right:
            initializers.append(initializers[0])
        (copy.path / "encoder.onnx").write_bytes(model.SerializeToString())
        bundle = write(copy, tmp_path / "changed")
        with pytest.raises(BundleError, match=r"encoder\.onnx: its external weights differ from those"):
            bundle.load()


@pytest.mark.parametrize(("change", "message"), [
    ({"file": "../data"}, r"found '\.\./data', expected a plain file name"),
    ({"file": "other.data"}, r"encoder\.onnx: weights are in 'other\.data', which is not listed"),
    ({"offset": -1}, "offset, length and shape must be at least 0"),
    ({"shape": [-2, 3]}, "offset, length and shape must be at least 0"),
    ({"shape": "x"}, "shape must be a list, got 'x'"),
    ({"offset": 1 << 40}, r"bytes at offset 1099511627776 exceed the file size \d+"),
    ({"shape": [1, 1]}, r"length is \d+ bytes, expected 4"),
])  # fmt: skip
def test_records_that_are_refused(copy, monkeypatch, change, message):
    monkeypatch.setattr(graph_file, "_SMALL", 1 << 40)
    edit_manifest(copy.path, lambda content: content["external"]["encoder.onnx"][0].update(change))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy.path).load()


def test_files_that_cannot_be_read(copy, monkeypatch):
    real = Path.open

    def refused(path, *arguments):
        if path.name == "ctc.onnx":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(Path, "open", refused)
    for load in (copy.load, lambda: Bundle.open(copy.path)):
        with pytest.raises(BundleError, match=r"ctc\.onnx: cannot be read: Permission denied"):
            load()
