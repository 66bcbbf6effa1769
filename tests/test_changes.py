"""A bundle that quantization broke is told, with or without recordings, and so is what repairs it."""

import json
import re
import shlex

import numpy as np
import onnx_ir as ir
import pytest
from noise import write_noise

from u2moe.quantize.smoothing import rewritten_together
from u2moe.runtime import Bundle
from u2moe.runtime.cli import main


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return sorted(write_noise(tmp_path_factory.mktemp("recordings"), 3, 48_000).iterdir())


@pytest.fixture(scope="module")
def broken(exported, tmp_path_factory):
    """The same network in float32, of which int8 leaves the CTC head nothing: its inputs are of two sizes."""

    def add_outlier(models):
        for name, factor in {"encoder.after_norm.weight": 4096, "encoder.after_norm.bias": 4096}.items():
            change(models, name, 5, factor)
        for model in models:
            for name in model.graph.initializers:
                if name == "ctc.ctc_lo.weight" or name.endswith("src_attn.linear_kv.weight"):
                    change([model], name, 5, 1 / 4096)

    return rewritten_together(Bundle.open(exported("moe_tiny")), tmp_path_factory.mktemp("broken") / "it", add_outlier)


def change(models, name, row, factor):
    for model in models:
        if (value := model.graph.initializers.get(name)) is not None:
            array = value.const_value.numpy().copy()
            array[row] *= factor
            value.const_value = ir.tensor(array.astype(np.float32), name=name)


@pytest.mark.parametrize("has_recordings", [True, False])
def test_a_broken_bundle_is_told_and_repaired_by_the_command_that_is_named(
    has_recordings, broken, recordings, tmp_path, capsys
):
    folder, out = recordings[0].parent, tmp_path / "out"
    options = ["--list", str(folder)] if has_recordings else ["--no-report"]
    assert main(["quantize", str(broken.path), str(out), *options]) == 3
    shown = capsys.readouterr()
    assert shown.err.endswith(
        f"u2moe: warning: {out}: more than 10% of the tokens change: hardly of use (--accept-damage: exit code 0)\n"
    )
    wrote, heard, tokens, texts, layers, repair = shown.out.splitlines()[-6:]
    assert wrote.startswith(f"wrote {out} (")
    kind = "recordings, 8.9 s" if has_recordings else "pieces of noise, 5.9 s"
    assert re.fullmatch(rf"on 3 {kind}, \d+ encoder frames:", heard)
    assert re.fullmatch(
        r"  of \d+ tokens change greedy \d+\.\d+%.*, second pass .*; divergence \d.* nats a frame", tokens
    )
    by_noise = r" \(half a step of 16-bit noise changes [0-3]\)" if has_recordings else ""
    assert re.fullmatch(rf"  of 3 texts change 3{by_noise}", texts)
    assert re.fullmatch(r"  most by ctc\.ctc_lo \(.* nats\), .* nats\), .* nats\)", layers)
    assert Bundle.open(out)
    assert main(["quantize", str(broken.path), str(out), *options, "--overwrite", "--accept-damage"]) == 0

    command = shlex.split(repair.removeprefix("to change less: ").replace("RECORDINGS", str(folder)))
    assert main(command[1:]) == 0
    assert "--max-damage 2" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("option", "message"), [
    ("--max-damage=200", "--max-damage must be a number above 0 and at most 100, got 200.0"),
    ("--max-damage=nan", "--max-damage must be a number above 0 and at most 100, got nan"),
    ("--max-size=-1", "--max-size must be a number above 0, got -1.0"),
    ("--layer=ctc.ctc_lo", "--layer must be LAYER=FORMAT, got 'ctc.ctc_lo'"),
    ("--layer=ctc.nothing=int8", "has no layer ctc.nothing; layers are ctc.ctc_lo, "),
    ("--layers=LIST", "must hold formats by the names of layers"),
])  # fmt: skip
def test_mistakes_are_told_in_the_words_of_the_options(option, message, exported, recordings, tmp_path, capsys):
    (tmp_path / "list.json").write_text('["ctc.ctc_lo"]', encoding="utf-8")
    option = option.replace("LIST", str(tmp_path / "list.json"))
    calibrate = ["--calibrate", str(recordings[0])] if option.startswith("--max") else []
    arguments = ["quantize", str(exported("moe_tiny")), str(tmp_path / "out"), option, *calibrate]
    assert main([*arguments, "--no-report"]) == 1
    assert message in capsys.readouterr().err


def test_formats_of_layers_are_chosen_by_hand_and_bundles_compared(exported, recordings, tmp_path, capsys):
    (tmp_path / "layers.json").write_text('{"ctc.ctc_lo": "int4", "encoder.embed": "fp16"}', encoding="utf-8")
    source, out, written = str(exported("moe_tiny")), str(tmp_path / "out"), tmp_path / "changes.json"
    options = ["--layers", str(tmp_path / "layers.json"), "--layer", "ctc.ctc_lo=fp16", "--accept-damage"]
    assert main(["quantize", source, out, *options, "--no-report"]) == 0
    chosen = {"ctc.ctc_lo": "fp16", "encoder.embed": "fp16"}
    assert Bundle.open(out).manifest.quantization["exceptions"] == chosen
    kinds = {value.const_value.dtype for value in ir.load(tmp_path / "out" / "ctc.onnx").graph.initializers.values()}
    assert ir.DataType.FLOAT16 in kinds
    assert ir.DataType.INT8 not in kinds
    capsys.readouterr()
    heard = ["--list", str(recordings[0].parent)]
    assert main(["bench", "--divergence", source, out, *heard, "-o", str(written)]) == 0
    assert capsys.readouterr().out.startswith(f"{out} beside {source}\non 3 recordings, 8.9 s, ")
    assert json.loads(written.read_text(encoding="utf-8"))["divergence"]["value"] > 0
    assert main(["bench", "--divergence", source, source, *heard]) == 0
    assert "second pass 0.00%" in capsys.readouterr().out
    assert main(["bench", "--divergence", source]) == 2
