"""Sessions of the library side by side, in threads, over forks, and while it is loaded and unloaded; without the
recogniser."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from layers import attention_model, attention_shapes, convolutions_model, mixture_model, mixture_weights, session_with

from u2moe.quantize.passes.front_end import FirstConvolutions, Window
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.attention import Heads

CHILD_S = 120
"""Limit in seconds for a forked process, which could otherwise wait for a lock forever."""
DIM = 60


def layers():
    """Return layers as models, with their feeds."""
    random = np.random.default_rng(0)
    x = random.standard_normal((70, DIM)).astype(np.float32)
    int8 = Mixture(num_experts=5, top_k=2, activation="swish", weights="int8")
    int4 = Mixture(num_experts=4, top_k=2, activation="gelu", weights="int4", block_size=32)
    window, heads = Window(kernel=3, stride=2), Heads(num_heads=4, num_kv_heads=2, size=20)
    both = FirstConvolutions(bins=23, channels=20, first=window, second=window)
    shapes = attention_shapes(heads, 2, 16, 40, relative=True, wide=(True, True, False))
    attended = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return [
        *((mixture_model(each, mixture_weights(random, each, DIM, 90), DIM, 90), {"x": x}) for each in (int8, int4)),
        (convolutions_model(both, 30, random), {"x": random.standard_normal((2, 40, 23)).astype(np.float32)}),
        (attention_model(heads, relative=True), {**attended, "block": np.array(1), "first_kept": np.array([2])}),
    ]


LAYERS = layers()


def sessions_of(library, num_threads=1):
    return [session_with(model, library, num_threads) for model, _ in LAYERS]


def run(sessions):
    return [session.run(None, feeds)[0] for session, (_, feeds) in zip(sessions, LAYERS, strict=True)]


def outputs(library, num_threads=1):
    return run(sessions_of(library, num_threads))


def all_equal(found, expected):
    return all(map(np.array_equal, found, expected))


@pytest.mark.slow
def test_sessions_come_and_go_in_threads_while_others_run(library):
    expected = outputs(library)
    shared = sessions_of(library, num_threads=2)

    def use(number):
        if number % 2:
            return all_equal(outputs(library, num_threads=1 + number % 3), expected)
        return all_equal(run(shared), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(10)))


LOADED = """
import sys
import numpy as np
import onnxruntime
from damage import resident_mb

layer, library = sys.argv[1:]
x = np.ones((300, {dim}), np.float32)
is_mapped = lambda: library in open("/proc/self/maps").read()
for number in range(24):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(layer, options, ["CPUExecutionProvider"])
    session.run(None, {{"x": x}})
    assert is_mapped()
    del session, options
    print(is_mapped(), resident_mb())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mapped files")
def test_the_library_is_unloaded_and_leaves_no_memory_behind(library, tmp_path):
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("sanitizers keep freed memory")
    (tmp_path / "layer.onnx").write_bytes(LAYERS[0][0])
    command = [sys.executable, "-c", LOADED.format(dim=DIM), str(tmp_path / "layer.onnx"), str(library.resolve())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    mapped, memory = zip(*(line.split() for line in lines), strict=True)
    assert set(mapped) == {"False"}
    # The bundled C++ library keeps 73 kB for exceptions, 1 MB in 14 rounds. Scratch memory of a call would be 16 MB.
    assert float(memory[-1]) - float(memory[9]) < 8


def in_child(use):
    """Return whether `use` returns True in a forked process, which is killed if it hangs."""
    if (child := os.fork()) == 0:
        os._exit(0 if use() else 1)
    deadline = time.monotonic() + CHILD_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_forks_while_threads_compute(library):
    """Locks of the library that threads hold during the fork must be free in the child, which lacks these threads. The
    child creates new sessions, because onnxruntime's sessions have locks that it does not free."""
    expected = outputs(library)
    sessions, others = (sessions_of(library) for _ in range(2))
    is_over = threading.Event()

    def compute():
        while not is_over.is_set():
            run(others)

    def use():
        return all_equal(run(sessions), expected)

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(compute) for _ in range(2)]
        try:
            assert all(in_child(use) for _ in range(10))
        finally:
            is_over.set()
        for one in busy:
            one.result()
    assert use()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_makes_sessions_of_its_own(library):
    expected = outputs(library)
    assert in_child(lambda: all_equal(outputs(library, num_threads=2), expected))
    assert all_equal(outputs(library), expected)
