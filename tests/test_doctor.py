"""`u2moe doctor`: the page for bug reports, and --check, which compares providers with the CPU."""

import json
import re
import shutil

import numpy as np
import pytest
from manifests import flipped

from u2moe.benchmarks.bench import check, doctor
from u2moe.benchmarks.instruments.workload import utterance
from u2moe.runtime import bundle_location, cli
from u2moe.runtime.model.device import DeviceMemory


@pytest.mark.slow
def test_the_page_says_what_a_report_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "_LONGEST_S", 0.0)
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    for name in ("u2moe", "Python", "onnxruntime", "processor:", "kernels:", "libsndfile"):
        assert f"{name} " in out
    assert "CPUExecutionProvider" in out
    assert re.search(
        r"demo model [0-9a-f]{16}: tokens [0-9a-f]{16}\nRTF \d\.\d{4}, \d+ times real time, 1 thread\n$", out
    )
    assert err == ""
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", tmp_path / "none")
    assert cli.main(["doctor"]) == 1
    assert "demo model: the demo model is not installed: run pip install ./runtime/demo" in capsys.readouterr().out
    for option in (["--providers", "CPUExecutionProvider"], ["bundle"], ["-o", "check.json"]):
        assert cli.main(["doctor", *option]) == 1
        assert "requires --check" in capsys.readouterr().err


@pytest.fixture
def checked(tmp_path, capsys):
    """Return a function that checks a bundle and returns exit status, report and text."""

    def run(bundle, *options):
        code = cli.main(["doctor", "--check", str(bundle), "-o", str(tmp_path / "check.json"), *options])
        return code, json.loads((tmp_path / "check.json").read_bytes()), capsys.readouterr().out

    return run


QUICK = """import importlib, sys
from u2moe.benchmarks.bench import check
check.CHUNKS, check.NUM_WARM, check.NUM_CHUNKS, check._TIMED_S = ((16, 4), (4, 0)), 20, 21, 0.0
if importlib.util.find_spec("u2moe_kernels"):
    kernels = importlib.import_module("u2moe_kernels")
    found = kernels.description()
    kernels.description = lambda: {**found, "isas": found["isas"][-2:]}
check.write_findings(*sys.argv[1:])"""


@pytest.mark.slow
def test_a_machine_that_computes_correctly_passes(checked, monkeypatch, quantized):
    monkeypatch.setattr(check, "_CHILD", QUICK)
    bundle = quantized("int8")
    code, report, text = checked(bundle.path)
    assert (code, report["failures"], report["passed"]) == (0, [], True)
    steps = {item["step"] for item in report["comparisons"]}
    assert steps >= {"graphs", "offsets", "batches", "threads and device memory"}
    assert all(item["difference"] <= item["limit"] and item["reason"] for item in report["comparisons"])
    assert [item["limit"] for item in report["comparisons"] if item["of"].endswith("with arrays")] == [0.0] * 6
    assert report["nodes"].keys() == {"encoder", "ctc", "decoder"}
    assert all(nodes["providers"].keys() == {"CPUExecutionProvider"} for nodes in report["nodes"].values())
    assert report["memory"]["chunks"] == 21
    assert {"full context", "chunks of 16, left 4"} == report["real_time_factor"].keys()
    if "digests" in report:
        assert len(set(report["digests"].values())) == 1
        assert "native kernels" in steps
    else:
        assert "not installed" in report["native_kernels"]
    assert text.endswith("\npassed\n")
    assert str(bundle.path) not in json.dumps(report)


def test_what_ends_early_does_not_pass(checked, small_bundle, tmp_path, monkeypatch):
    code, report, text = checked(small_bundle.path, "--providers", "RocketExecutionProvider")
    (failure,) = report["failures"]
    assert (code, report["passed"], report["providers"]) == (1, False, ["RocketExecutionProvider"])
    assert failure.startswith("load: RocketExecutionProvider is not installed: no known package on PyPI has it; ")
    assert text.endswith(f"failed: {failure}\nNOT PASSED\n")
    without_demo = "import pathlib, u2moe.runtime.bundle_location as place; place.DEMO_FOLDER = pathlib.Path('none')\n"
    monkeypatch.setattr(check, "_CHILD", without_demo + QUICK)
    assert "load: the demo model is not installed: run " in checked(small_bundle.path)[1]["failures"][0]
    monkeypatch.setattr(check, "_CHILD", QUICK)
    flipped("decoder.onnx")(shutil.copytree(small_bundle.path, tmp_path / "broken"))
    code, report, _ = checked(tmp_path / "broken")
    assert code == 1
    assert re.match(r"load: decoder\.onnx: .*sha256", report["failures"][0])
    child = """import os, signal, sys
open(sys.argv[1], "w").write('{"doing": "batches"}\\n')
os.kill(os.getpid(), signal.SIGSEGV)"""
    monkeypatch.setattr(check, "_CHILD", child)
    code, report, _ = checked(small_bundle.path)
    assert (code, report["failures"]) == (1, ["batches: the process ended with SIGSEGV"])


@pytest.fixture
def found(small_bundle, monkeypatch, tmp_path):
    """Return a function that runs one step in this process and returns comparisons and failures."""
    monkeypatch.setattr(check, "CHUNKS", ((16, 4),))
    monkeypatch.setattr(check, "utterance", lambda bundle: utterance(bundle)[:400])

    def run(step):
        monkeypatch.setattr(check, "STEPS", {step: check.STEPS[step]})
        check.write_findings(str(tmp_path / "findings"), str(small_bundle.path), "CPUExecutionProvider")
        lines = [json.loads(line) for line in (tmp_path / "findings").read_text(encoding="utf-8").splitlines()]
        return tuple([one for line in lines for one in line.get(key, [])] for key in ("comparisons", "failures"))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("step", ["graphs", "offsets", "batches", "ctc"])
def test_a_device_that_computes_something_else_does_not_pass(found, monkeypatch, step):
    right = DeviceMemory.run
    step, read, factor = ("graphs", "encoder_out", np.nan) if step == "ctc" else (step, "chunk", 1.5)

    def run(self, feeds, outputs, stay):
        wrong = {name: np.asarray(value) * np.float32(factor) for name, value in feeds.items() if name == read}
        return right(self, {**feeds, **wrong}, outputs, stay)

    monkeypatch.setattr(DeviceMemory, "run", run)
    comparisons, failures = found(step)
    assert failures or not all(item["holds"] for item in comparisons)


@pytest.mark.slow
def test_a_kernel_with_a_wrong_digest_or_without_an_instruction_set_does_not_pass(found, small_bundle, monkeypatch):
    kernels = pytest.importorskip("u2moe_kernels")
    with pytest.raises(check.KernelsError, match=r"u2moe-kernels failed with the instruction set vax: .*vax"):
        check.digest_of(small_bundle.path, "vax")
    sets = kernels.description()["isas"]
    monkeypatch.setattr(kernels, "description", lambda: {"isas": [*sets[:1], "other", "scalar"]})
    monkeypatch.setattr(check, "digest_of", lambda _, isa: {"other": "0123"}.get(isa, "4567"))
    assert found("native kernels")[1] == [
        "native kernels: results of u2moe-kernels depend on the instruction set: other (0123), all others (4567)"
    ]
