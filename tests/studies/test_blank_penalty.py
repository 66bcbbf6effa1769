import json

from u2moe.benchmarks.studies import blank_penalty
from u2moe.runtime.bundle_location import DEMO_FOLDER


def test_errors_are_counted_by_bundle_and_penalty(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(blank_penalty, "PENALTIES", (0.0, 10.0))
    file = tmp_path / "found.json"
    clips = str(DEMO_FOLDER / "clips" / "transcripts.txt")
    blank_penalty.main([f"demo={DEMO_FOLDER}", "--list", clips, "--results", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    found = results["bundles"]["demo"]["penalties"]
    assert list(found) == ["0", "10"]
    assert found["0"]["errors"] == 0
    assert found["10"]["errors"] > 0
    assert {item["words"] for item in found.values()} == {found["0"]["words"]}
    assert blank_penalty.values(results)["table"] in capsys.readouterr().out
