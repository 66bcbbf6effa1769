import json

from u2moe.benchmarks.studies import simulators
from u2moe.benchmarks.studies.simulators import FIXED, PLAIN, QDQ


def test_variants_are_compared_with_the_float_graph(bundle, clips, tmp_path, monkeypatch, capsys):
    """Variants of onnxruntime. Missing environments are skipped, compile errors reported, and work is kept."""
    files = sorted(clips.glob("*.wav"))
    (tmp_path / "list.tsv").write_text("".join(f"{file}\tone two\n" for file in files))
    refused = {"litert int8": ("litert", "int8")}
    monkeypatch.setattr(simulators, "VARIANTS", dict.fromkeys((PLAIN, FIXED, QDQ), ("",)) | refused)
    monkeypatch.setattr(simulators, "_version", lambda python, package: "1.0")
    work, results = tmp_path / "work", tmp_path / "found.json"
    work.mkdir()
    (work / "litert_int8.jsonl").write_text('{"refused": "no lowering of Min"}\n')
    arguments = [str(bundle.path), str(tmp_path / "list.tsv"), "--calibration", *map(str, files)]
    arguments += ["--work-dir", str(work), "--results", str(results), "--python", "litert=python"]
    simulators.main([*arguments, "--only", PLAIN])
    (work / "float32.jsonl").write_text("".join((work / "float32.jsonl").read_text().splitlines(keepends=True)[:-1]))
    simulators.main(arguments)
    found = json.loads(results.read_text())["variants"]
    assert found["litert int8"] == {"refused": "no lowering of Min"}
    assert (found[PLAIN]["different"], found[PLAIN]["same_best_tokens"]) == (0, 1)
    assert found[PLAIN]["recordings"] == found[QDQ]["recordings"] == len(files)
    assert 0.9 < found[QDQ]["least_cosine"] < 1
    assert found[FIXED]["cosine"] < 1
    assert found[PLAIN]["spoken"] == 2 * len(files)
    values = simulators.values(json.loads(results.read_text()))
    assert values["table"] in capsys.readouterr().out
    assert "| ai-edge-litert 1.0 | int8 | no lowering of Min |" in values["table"]


def test_targets_are_of_what_was_run():
    own = {"different": 2, "words": 50, "recordings": 9}
    (found,) = simulators.targets({"variants": {"qualcomm float16": own, "rockchip float16": {"refused": "not run"}}})
    assert (found.met, found.value) == (False, 4.0)
