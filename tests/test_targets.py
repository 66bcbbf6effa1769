"""Output files are checked before the work starts."""

import pytest

from u2moe.export import exporter, sherpa
from u2moe.quantize import quantizer
from u2moe.runtime.cli import main, outputs


@pytest.fixture
def no_work(monkeypatch):
    def begun(*_, **__):
        pytest.fail("the work has begun")

    monkeypatch.setattr(quantizer, "read_features", begun)
    monkeypatch.setattr(exporter.Checkpoint, "open", begun)
    monkeypatch.setattr(sherpa, "supported_graphs", begun)


def commands(bundle, tmp_path):
    return {
        "quantize": ["quantize", str(bundle.path), str(tmp_path / "out")],
        "export": ["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")],
        "sherpa-onnx": ["convert", str(bundle.path), str(tmp_path / "out"), "--profile", "sherpa-onnx"],
    }


@pytest.mark.parametrize("command", ["quantize", "export", "sherpa-onnx"])
@pytest.mark.parametrize("occupied", [True, False])
def test_a_folder_that_cannot_be_written(bundle, tmp_path, capsys, no_work, command, occupied):
    if occupied:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
    else:
        tmp_path = tmp_path / "file"
        tmp_path.touch()
    assert main(commands(bundle, tmp_path)[command]) == 1
    expected = "is not empty" if occupied else "cannot be written"
    assert f"u2moe: error: {tmp_path / 'out'}: {expected}" in capsys.readouterr().err


def test_trying_leaves_no_trace(tmp_path):
    outputs.try_to_write(None)
    outputs.try_to_write(tmp_path / "new")
    (tmp_path / "old").write_text("kept")
    outputs.try_to_write(tmp_path / "old")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old", "kept")]
