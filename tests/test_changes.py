"""A bundle that quantization broke is told, with or without recordings, and so is what repairs it."""

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
