"""Measurements besides speed: use and load of experts, memory, disk, and the machine."""

import math
import subprocess

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.bench.expert_usage import measure_experts, summary
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.instruments import host as machine
from u2moe.benchmarks.instruments.probe import Mode
from u2moe.quantize.observed import RoutedLayer
from u2moe.runtime import Bundle

STREAM = Mode(chunk_size=4, num_left_chunks=4)


def layer(name="one", expert_bytes=10):
    gate = np.eye(4, dtype=np.float32)
    return RoutedLayer(name=name, tokens="x", gate=gate, top_k=2, expert_bytes=expert_bytes)


def test_the_router_takes_the_largest_in_chunks_and_the_whole_alike(bundle, exported, sound):
    tokens = np.array([[[9, 5, 1, 2], [0, 0, 7, 8], [3, 9, 0, 0]]], np.float32)
    np.testing.assert_array_equal(layer().counts(tokens), [2, 2, 1, 1])
    counts = np.array([[[4, 0, 0, 0], [1, 1, 1, 1]], [[2, 2, 0, 0], [1, 1, 1, 1]]])
    found = summary([layer("a"), layer("b", expert_bytes=100)], counts)
    assert found["touched"] == {"mean": 2.75, "layers": {"a": 1.5, "b": 4.0}}
    assert (found["bytes_touched"]["p50"], found["bytes_touched"]["max"]) == (415.0, 420.0)
    assert found["bytes"] == 440
    assert found["load"] == {"a": [0.75, 0.25, 0.0, 0.0], "b": [0.25] * 4}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["load_entropy"]["layers"] == {"a": pytest.approx(entropy), "b": pytest.approx(1.0)}
    assert (found["num_chunks"], found["num_experts"], found["experts_per_token"]) == (2, 4, 2)
    assert measure_experts(Bundle.open(exported("dense_tiny")), [sound], [Mode()]) == {}
    found = measure_experts(bundle, [sound, sound[:20_000]], [Mode(), STREAM])
    assert list(found) == ["full context", "chunk 4, left 4"]
    whole, chunks = found.values()
    assert whole["num_chunks"] == 2
    assert chunks["num_chunks"] > 30
    assert chunks["touched"]["mean"] < whole["touched"]["mean"]
    # random weights attend locally: a token uses nearly the same experts in any context
    for name, load in whole["load"].items():
        assert sum(load) == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(chunks["load"][name], load, atol=0.15)


@pytest.mark.slow
def test_a_fresh_process_tells_time_and_memory(exported, sound, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound[:16_000], 16_000)
    found = measure_footprint({"moe": Bundle.open(exported("moe_tiny"))}, tmp_path / "a.wav", repetitions=1)["moe"]
    assert set(found) >= {"import_s", "verify_s", "load_s", "first_s", "disk"}
    assert min(found[name]["median"] for name in ("import_s", "verify_s", "load_s", "first_s")) > 0
    sizes = [found[name]["median"] for name in ("imported_bytes", "loaded_bytes", "peak_bytes")]
    assert found["disk"]["files"] == sum(
        file.stat().st_size for file in exported("moe_tiny").iterdir() if file.suffix != ".json"
    )
    assert 20e6 < sizes[0] < sizes[1] <= sizes[2] < 500e6


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx2 avx512_vnni

processor\t: 1
model name\t: other
"""
ARM = """processor\t: 0
Features\t: fp asimd i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Model\t\t: Raspberry Pi 5 Model B
"""


@pytest.mark.parametrize(("text", "name", "sets"), [
    (X86, "AMD EPYC", ["avx2", "avx512_vnni"]),
    (ARM, "Raspberry Pi 5 Model B, CPU implementer 0x41 CPU part 0xd0b", ["asimd", "i8mm"]),
])  # fmt: skip
def test_processors_are_told(monkeypatch, tmp_path, text, name, sets):
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    found = machine.describe_machine()
    assert found["processor"] == name
    assert found["instruction_sets"] == sets
    assert found["processor_version"] == ("cpu family 26, model 2, stepping 1" if text == X86 else "")


def test_caches_of_data_and_what_the_system_does_not_tell(tmp_path, monkeypatch):
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (3, "Unified", "4096K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n", encoding="utf-8")
    assert machine.caches(tmp_path) == {"L1": 48 * 1024, "L3": 4096 * 1024}
    for name in ("_CPUINFO", "_MEMINFO", "_STATUS", "_CACHES"):
        monkeypatch.setattr(machine, name, tmp_path / "none")
    found = machine.describe_machine()
    assert (found["memory_bytes"], found["caches"], found["instruction_sets"]) == (None, {}, [])
    assert found["processor"]
    assert machine.status_bytes("VmHWM") is None


def test_commit_is_that_of_the_repository_that_holds_the_file(tmp_path, tmp_path_factory, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path_factory.mktemp("package") / "bench" / "a.py"  # as if installed from the clone
    file = tmp_path / package.parent.parent.name / "bench" / "a.py"
    for copy in (file, package):
        copy.parent.mkdir(parents=True)
        copy.write_text("1", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    git("init")
    assert machine.commit(file) is machine.commit(package) is None  # not in the repository's index
    git("add", ".")
    git("commit", "-m", "one")
    name = machine.commit(file)
    assert len(name) == 12
    assert machine.commit(package) == name
    file.write_text("2", encoding="utf-8")
    assert machine.commit(file) == f"{name}+"
    assert machine.commit(package) is None  # another version
