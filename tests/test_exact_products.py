"""Integer products are exact on every processor, tested with the largest values through the real functions. On a
processor with exact products, the first tests cannot fail. They therefore run again in an emulator of a processor whose
sums of pairs saturate, if one is installed (Debian: qemu-user)."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.formats import CONVERSIONS, conversion
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.runtime.bundle.mixture import Mixture

pytestmark = pytest.mark.slow

EMULATOR = shutil.which("qemu-x86_64")
SATURATES = "U2MOE_TEST_SATURATES"  # set if sums of pairs saturate
DIM = 32
INT8 = Int8Conversion()


def extreme_weights(rows):
    """Return columns of the largest possible weights: all of one sign, in pairs of one sign, alternating, and
    random."""
    weight = np.random.default_rng(0).choice([-1.0, 1.0], (rows, DIM))
    weight[:, 0], weight[:, 1] = 1, -1
    weight[:, 2] = np.where(np.arange(rows) // 2 % 2, -1, 1)
    weight[:, 3] = np.where(np.arange(rows) % 2, -1, 1)
    weight[:, 4] = np.where(np.arange(rows) % 2, 0, 1)
    return weight.astype(np.float32)


def extreme_rows(shape):
    """Return activations that all have their row's largest magnitude, with random signs or 0."""
    x = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], shape).astype(np.float32)
    rows = x.reshape(-1, shape[-1])
    rows[0], rows[1:2] = 1, -1
    return x


@pytest.mark.parametrize("kind", [None, "relu"])
def test_largest_rows(kind, session_of):
    integers, scale = int8_columns(extreme_weights(DIM))
    session = session_of([INT8.rows(kind), INT8.product_of_rows()], {"x": 3}, {"weight": integers, "scale": scale})
    for num_tokens in (1, 2, 17):
        x = extreme_rows((1, num_tokens, DIM))
        x = np.abs(x) if kind else x
        expected = x.astype(float) @ integers * scale
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_largest_tokens_and_hidden_activations(kind, session_of):
    made = conversion(kind, 16)
    size = made.block_size
    mixture = Mixture(num_experts=2, top_k=1, activation="relu", bias=False, weights=kind, block_size=size)
    weights = {"w1": np.ones((DIM, 24), np.float32), "w2": extreme_weights(24)}
    parts, restored = {}, {}
    for name, weight in weights.items():
        stored = made.parts(weight)
        restored[name] = made.restored(stored, len(weight))
        parts |= zip(made.names(name, bias=False), stored, strict=True)
    initial = {name: parts[name.partition("_")[2]] for name in made.names_of_experts(mixture)}
    initial = {"gate": np.zeros((DIM, 2), np.float32), **initial}
    session = session_of([made.mixture(mixture, DIM, 24)], {"x": 3}, initial)
    for num_tokens in (1, 9):
        x = np.ones((1, num_tokens, DIM), np.float32)
        expected = x.astype(float) @ restored["w1"] @ restored["w2"]
        # blocks of onnxruntime's 4-bit kernel have scales in float16
        limit = (1e-3 if size else 1e-5) * np.abs(expected).max()
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=limit)


@pytest.mark.skipif(SATURATES not in os.environ, reason="needs a processor whose pairs saturate")
def test_a_processor_whose_pairs_saturate_gets_larger_weights_wrong(session_of):
    """The other tests would detect this, which shows that they are meaningful there."""
    weights = {"weight": np.full((DIM, DIM), 127, np.int8), "scale": np.ones(DIM, "f4")}
    session = session_of([INT8.rows(), INT8.product_of_rows()], {"x": 3}, weights)
    assert not np.allclose(session.run(None, {"x": np.ones((1, 3, DIM), np.float32)})[0], DIM * 127)


@pytest.mark.endurance
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64, of Debian's qemu-user")
def test_the_same_on_a_processor_without_vnni():
    options = ["-q", "-p", "no:cacheprovider", "-k", "largest or saturate"]
    command = [EMULATOR, "-cpu", "Haswell-noTSX", sys.executable, "-m", "pytest", *options, __file__]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, SATURATES: "1"})
    assert found.returncode == 0, found.stdout + found.stderr
    assert "5 passed" in found.stdout
