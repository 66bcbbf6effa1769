"""The comparison of choices of layers that stay in int8, on a tiny model."""

import json

import pytest
import soundfile

from u2moe.benchmarks.quality.int8_layers import CHOICES, SHARES, main, values

pytestmark = pytest.mark.slow


def test_choices_are_compared_by_the_error_of_the_encoder(exported, sound, tmp_path, capsys):
    """Of six layers, a quarter is one and a half are three."""
    soundfile.write(tmp_path / "one.wav", sound, 16000)
    (tmp_path / "set.tsv").write_text("one.wav\tA\n", encoding="utf-8")
    arguments = [str(exported("moe_tiny")), "--manifest", str(tmp_path / "set.tsv")]
    main([*arguments, "--results", str(tmp_path / "found.json")])
    said = capsys.readouterr()
    assert [said.err.count(f"- {count} layers in int8") for count in range(7)] == [1, 4, 4, 4, 0, 0, 1]

    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert list(found["own"]) == found["layers"]
    assert all(0.03 < error < 0.2 for error in found["own"].values())  # 4 bits alone, see `test_quantize`
    assert found["choices"].keys() == CHOICES.keys()
    error = {name: [of["encoder_relative"] for of in own.values()] for name, own in found["choices"].items()}
    least, most = (found[kind]["encoder_relative"] for kind in ("int8", "int4"))
    assert all(least < value < most for value in error["last"])
    assert len({tuple(own) for own in error.values()}) == len(CHOICES)  # other layers, other errors
    assert all(len(own) == len(SHARES) for own in error.values())
    shown = values(found)
    assert shown["table"] in said.out
    assert shown["int4"] == f"{most:.1%}"
