"""Output files are checked before the work starts."""

import pytest

from u2moe.export import exporter, sherpa
from u2moe.quantize import quantizer
from u2moe.runtime.cli import main, outputs


@pytest.mark.parametrize("command", ["quantize FROM TO", "export FROM TO", "convert FROM TO --profile sherpa-onnx"])
@pytest.mark.parametrize("occupied", [True, False])
def test_a_folder_that_cannot_be_written(bundle, tmp_path, capsys, monkeypatch, command, occupied):
    for module, name in ((quantizer, "read_features"), (exporter.Checkpoint, "open"), (sherpa, "supported_graphs")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work has begun"))
    folder = tmp_path / "out" if occupied else tmp_path / "file" / "out"
    if occupied:
        folder.mkdir()
    (tmp_path / ("out/precious" if occupied else "file")).touch()
    places = {"FROM": str(bundle.path), "TO": str(folder)}
    assert main([places.get(word, word) for word in command.split()]) == 1
    expected = "is not empty" if occupied else "cannot be written"
    assert f"u2moe: error: {folder}: {expected}" in capsys.readouterr().err


def test_trying_leaves_no_trace(tmp_path):
    outputs.try_to_write(None)
    outputs.try_to_write(tmp_path / "new")
    (tmp_path / "old").write_text("kept")
    outputs.try_to_write(tmp_path / "old")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old", "kept")]
