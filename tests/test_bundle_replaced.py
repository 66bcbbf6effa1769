"""Bundles that change on disk while, or after, they are loaded: a recogniser has one of them, whole, or none."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from u2moe.quantize import quantizer, recipe
from u2moe.runtime import Bundle, BundleError, IntegrityError, Recognizer
from u2moe.runtime.bundle import graph_file
from u2moe.runtime.bundle.bundle import open_and_load
from u2moe.runtime.bundle.writer import BundleWriter

pytestmark = pytest.mark.slow

MAPS = Path("/proc/self/maps")
WRITER = """
import itertools, random, sys, time
from pathlib import Path
from u2moe.runtime import Bundle, BundleWriter

target, *sources = sys.argv[1:]
delays = random.Random(0)
for bundle in itertools.cycle([Bundle.open(source) for source in sources]):
    with BundleWriter(target, overwrite=True) as staging:
        for name in bundle.manifest.files:
            staging.add(name, Path(bundle.path / name))
        staging.finish(bundle.manifest)
    print("written", flush=True)
    sys.stdin.readline()
    time.sleep(delays.uniform(0, 0.4))
"""
"""Replaces a bundle by the other one a moment after each line that it reads."""


@pytest.fixture(scope="module")
def beside(bundle, tmp_path_factory):
    """A bundle whose weights lie beside its graphs, and one that differs in each of them."""
    result = []
    for factor in (1.0, 1.25):
        with BundleWriter(tmp_path_factory.mktemp("beside") / "bundle") as staging:
            staging.add("tokens.txt", bundle.path / "tokens.txt")
            for graph in bundle.manifest.model.graphs():
                model = onnx.load(bundle.path / graph.file)
                for tensor in model.graph.initializer:
                    array = onnx.numpy_helper.to_array(tensor)
                    if array.dtype == np.float32 and array.ndim > 1:
                        tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(factor), tensor.name))
                location = f"{graph.file}.data"
                onnx.save(
                    model, staging.path / graph.file, save_as_external_data=True, location=location, size_threshold=256
                )
            result.append(staging.finish(bundle.manifest))
    return result


def outputs(model):
    """What each of the graphs answers."""
    features = np.random.default_rng(0).standard_normal((200, 80)).astype(np.float32) + 12
    encoder_out = model.encode(features)
    frames = np.random.default_rng(1).standard_normal((9, encoder_out.shape[1])).astype(np.float32)
    return encoder_out, model.ctc(frames), model.rescore(frames, [[5, 6], [7]])[0]


def equal(one, other):
    return [bool(np.array_equal(a, b)) for a, b in zip(one, other, strict=True)]


def test_a_load_amid_replacements_is_one_bundle(beside, tmp_path):
    target = tmp_path / "bundle"
    expected = [outputs(bundle.load()) for bundle in beside]
    assert equal(*expected) == [False] * 3
    command = [sys.executable, "-c", WRITER, str(target), *(str(bundle.path) for bundle in beside)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        try:
            for _ in range(20):
                assert writer.stdout.readline() == "written\n"
                writer.stdin.write("again\n")
                writer.stdin.flush()
                bundle, model = open_and_load(target)
                which = [item.manifest for item in beside].index(bundle.manifest)
                assert equal(outputs(model), expected[which]) == [True] * 3
        finally:
            writer.kill()


def test_what_is_not_compared_is_read_all_the_same(beside, monkeypatch):
    monkeypatch.setattr(graph_file, "_SMALL", 0)
    compared, read = (outputs(beside[0].load(verify=verify)) for verify in (True, False))
    assert equal(compared, read) == [True] * 3


def test_a_bundle_that_is_replaced_after_it_was_opened_is_refused(beside, tmp_path):
    def write(source):
        with BundleWriter(tmp_path / "bundle", overwrite=True) as staging:
            for name in source.manifest.files:
                staging.add(name, source.path / name)
            return staging.finish(source.manifest)

    opened = write(beside[0])
    write(beside[1])
    with pytest.raises(IntegrityError, match=r"encoder\.onnx.*: (sha256|size) is"):
        opened.load()


def test_files_that_change_between_the_comparison_and_the_session_are_refused(beside, tmp_path, monkeypatch):
    bundle = copied(beside[0], tmp_path)
    hand_over = graph_file.GraphFile.hand_over

    def overwritten(self, options):
        file = bundle.path / "encoder.onnx.data"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        os.utime(file, ns=(0, 0))
        file.write_bytes(content)
        hand_over(self, options)

    monkeypatch.setattr(graph_file.GraphFile, "hand_over", overwritten)
    with pytest.raises(IntegrityError, match=r"encoder\.onnx\.data: was changed while it was loaded"):
        bundle.load()


def copied(bundle, tmp_path):
    with BundleWriter(tmp_path / "copy") as staging:
        for name in bundle.manifest.files:
            staging.add(name, bundle.path / name)
        return staging.finish(bundle.manifest)


SURVIVE = """
import os, sys
from pathlib import Path
import numpy as np
from u2moe.runtime import Bundle, graph_file

folder, damage = Path(sys.argv[1]), sys.argv[2]
graph_file._SMALL = 0  # else all weights of so small a model are handed over, whatever they are
model = Bundle.open(folder).load()

def outputs():
    encoder_out = model.encode(np.ones((200, 80), np.float32) * 12)
    return encoder_out, model.ctc(encoder_out), *model.rescore(encoder_out, [[5, 6], [7]])

before = outputs()
for file in folder.iterdir():
    if damage == "shortened":
        os.truncate(file, 0)
    elif damage == "overwritten":
        file.write_bytes(os.urandom(file.stat().st_size))
    else:
        file.unlink()
print([bool(np.array_equal(one, other)) for one, other in zip(before, outputs(), strict=True)])
"""


@pytest.mark.parametrize("damage", ["shortened", "overwritten", "removed"])
def test_a_loaded_recogniser_survives_what_becomes_of_its_files(beside, tmp_path, damage):
    """In a process of its own: reading a mapped file that was shortened ends it."""
    folder = copied(beside[0], tmp_path).path
    done = subprocess.run(
        [sys.executable, "-c", SURVIVE, str(folder), damage], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[True, True, True, True]\n"), done.stderr


@pytest.fixture(scope="module")
def float32(exported):
    return exported("moe_tiny")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
@pytest.mark.parametrize("name", ["int8", "int8-experts", "int4-experts", "fp16"])
def test_nothing_of_a_loaded_bundle_is_mapped(float32, tmp_path, monkeypatch, name):
    monkeypatch.setattr(graph_file, "_SMALL", 0)
    monkeypatch.setattr("u2moe.runtime.graph.file.EXTERNAL_DATA_LIMIT", 0)
    bundle, _ = quantizer.quantize_bundle(float32, tmp_path / "bundle", recipe(name))
    assert (bundle.path / "encoder.onnx.data").is_file()
    recognizer = Recognizer(bundle, bundle.load(kernels="onnxruntime"))
    assert str(bundle.path) not in MAPS.read_text(encoding="utf-8")
    mapped = bundle.load(sess_options=onnxruntime.SessionOptions())  # to which nothing can be handed over
    assert (str(bundle.path) in MAPS.read_text(encoding="utf-8")) == (name != "fp16")
    assert recognizer.model.providers == mapped.providers


def test_weights_that_the_manifest_does_not_list(beside, tmp_path):
    bundle = copied(beside[0], tmp_path)
    files = {name: digest for name, digest in bundle.manifest.files.items() if name != "encoder.onnx.data"}
    bundle.manifest.files.clear()
    bundle.manifest.files.update(files)
    with pytest.raises(BundleError, match=r"encoder\.onnx: weights are in 'encoder\.onnx\.data', which the manifest"):
        bundle.load()


@pytest.mark.parametrize("location", ["../encoder.onnx.data", "/etc/passwd", "a/b", "", "..", "a\\b"])
@pytest.mark.parametrize("verify", [True, False])
def test_weights_outside_the_folder(beside, tmp_path, location, verify):
    """onnxruntime 1.17 loads them from anywhere."""
    os.link(beside[0].path / "encoder.onnx.data", tmp_path / "encoder.onnx.data")
    model = onnx.load(beside[0].path / "encoder.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    with BundleWriter(tmp_path / "bundle") as staging:
        for name in beside[0].manifest.files:
            staging.add(name, beside[0].path / name)
        staging.add("encoder.onnx", model.SerializeToString())
        bundle = staging.finish(beside[0].manifest)
    for read in (lambda: bundle.load(verify=verify), lambda: Bundle.open(bundle.path)):
        with pytest.raises(BundleError, match=r"encoder\.onnx: external data: found .* expected a plain file name"):
            read()


def test_weights_behind_a_link(beside, tmp_path):
    bundle = copied(beside[0], tmp_path)
    (bundle.path / "ctc.onnx.data").rename(tmp_path / "elsewhere")
    (bundle.path / "ctc.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"ctc\.onnx\.data: is a link to"):
        bundle.load()


def test_files_that_cannot_be_read(beside, tmp_path, monkeypatch):
    bundle = copied(beside[0], tmp_path)
    real = os.open

    def refused(path, *arguments):
        if str(path).endswith("ctc.onnx"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refused)
    for load in (bundle.load, lambda: Bundle.open(bundle.path)):
        with pytest.raises(BundleError, match=r"ctc\.onnx: cannot be read: Permission denied"):
            load()
