"""Reports about a bundle that quantization broke, with or without recordings, and about its repair."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from corpora import write_noise

from u2moe.benchmarks.instruments import host
from u2moe.quantize import keep_calibration
from u2moe.quantize.observed import LeanSettings
from u2moe.quantize.report import compare_bytes
from u2moe.quantize.smoothing import rewritten_bundle
from u2moe.runtime import Bundle
from u2moe.runtime.cli import main


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return sorted(write_noise(tmp_path_factory.mktemp("recordings"), 3, 24_000).iterdir())


@pytest.fixture(scope="module")
def broken(small_bundle, tmp_path_factory):
    """Return a float32 network whose CTC head int8 destroys, because its inputs have two magnitudes."""

    def add_outlier(models):
        for name, value in (item for model in models for item in model.graph.initializers.items()):
            after = name == "ctc.ctc_lo.weight" or name.endswith("src_attn.linear_kv.weight")
            if after or name in ("encoder.after_norm.weight", "encoder.after_norm.bias"):
                array = value.const_value.numpy().copy()
                array[5] *= np.float32(1 / 4096 if after else 4096)
                value.const_value = ir.tensor(array, name=name)

    return rewritten_bundle(small_bundle, tmp_path_factory.mktemp("broken") / "it", add_outlier)


@pytest.mark.slow
@pytest.mark.parametrize("has_recordings", [True, False])
def test_a_broken_bundle_is_told_and_repaired_by_the_command_that_is_named(
    has_recordings, broken, recordings, tmp_path, capsys, monkeypatch
):
    folder, out, load = recordings[0].parent, tmp_path / "out", Bundle.load

    def load_without_arena(bundle, settings=None):  # arenas keep as much memory as the longest recording needs
        assert isinstance(settings, LeanSettings)
        return load(bundle, settings)

    monkeypatch.setattr(Bundle, "load", load_without_arena)
    options = ["--list", str(folder)] if has_recordings else ["--no-report"]
    assert main(["quantize", str(broken.path), str(out), *options]) == 3
    shown = capsys.readouterr()
    assert shown.err.endswith(
        f"u2moe: warning: {out}: more than 10% of the tokens change; use --accept-damage for exit code 0\n"
    )
    wrote, heard, tokens, texts, layers, repair = shown.out.splitlines()[-6:]
    assert wrote.startswith(f"wrote {out} (")
    clips = r"3 recordings \(command.flac, .*\) and 3 pieces of noise, 14\.\d s"
    kind = r"3 recordings \(0.wav, 1.wav, 2.wav\), 4.4 s" if has_recordings else clips
    assert re.fullmatch(rf"on {kind}, \d+ encoder frames:", heard)
    assert re.fullmatch(
        r"  changed tokens \(of \d+\): greedy \d+\.\d+%.*, second pass .*; divergence \d.* nats per frame", tokens
    )
    by_noise = r" \(noise of half a 16-bit step changes [0-3]\)" if has_recordings else ""
    assert re.fullmatch(rf"  changed texts \(of {3 if has_recordings else 6}\): \d{by_noise}", texts)
    assert re.fullmatch(r"  most by ctc\.ctc_lo \(.* nats\), .* nats\), .* nats\)", layers)
    assert Bundle.open(out)
    command = shlex.split(repair.removeprefix("to change fewer tokens: ").replace("RECORDINGS", str(folder)))
    if not has_recordings:
        assert command == ["u2moe", "quantize", str(broken.path), str(out), "--overwrite", "--calibrate", str(folder)]
        assert main([*command[1:5], "--list", str(folder), "--accept-damage"]) == 0
        return
    assert main(command[1:]) == 0
    assert "--max-damage 2" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps freed memory")
def test_freed_memory_returns_to_the_system_before_a_session_is_made():
    size = 1 << 16  # smaller than what glibc maps separately
    arrays = [np.ones(size, np.uint8) for _ in range(4000)]
    before, last = host.status_bytes("VmRSS"), arrays.pop()  # `last` ends the heap, which glibc shortens from its end
    arrays.clear()
    LeanSettings().session_options()
    assert before - host.status_bytes("VmRSS") > 3000 * last.nbytes


def test_mistakes_are_told_in_the_words_of_the_options(broken, small_bundle, recordings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text('["ctc.ctc_lo"]', encoding="utf-8")
    Path("a.wav").symlink_to(recordings[0])
    keep_calibration(small_bundle.path, [Path("a.wav")], Path("kept.npz"))
    Path("cut.npz").write_bytes(Path("kept.npz").read_bytes()[:1000])
    np.savez("nameless.npz", np.array(json.dumps({"format": "u2moe calibration 1"})))
    with np.load("kept.npz") as arrays:
        about, *features = arrays.values()
    np.savez("other.npz", np.array(str(about).replace("calibration 1", "calibration 2")), *features)
    for option, message in (
        ("--max-damage=200 --calibrate=a.wav", "--max-damage must be a number above 0 and at most 100, got 200.0"),
        ("--max-damage=nan --calibrate=a.wav", "--max-damage must be a number above 0 and at most 100, got nan"),
        ("--max-size=-1 --calibrate=a.wav", "--max-size must be a number above 0, got -1.0"),
        ("--max-size=1 --dry-run --calibrate=a.wav", "--dry-run measures nothing and cannot be combined with limits"),
        ("--layer=ctc.ctc_lo", "--layer must be LAYER=FORMAT, got 'ctc.ctc_lo'"),
        ("--layer=ctc.nothing=int8", "has no layer ctc.nothing; layers are ctc.ctc_lo, "),
        ("--layers=list.json", "must be a JSON object that maps layer names to formats"),
        ("--calibration=kept.wav", "--calibration must name a .npz file, got kept.wav"),
        ("--calibration=cut.npz", "cut.npz: cannot be read as a calibration file: "),
        ("--calibration=nameless.npz", "nameless.npz: cannot be read as a calibration file: "),
        ("--calibration=other.npz", "other.npz: is incomplete or was written by another version of u2moe"),
        ("--calibration=kept.npz", "kept.npz: was made for bundle"),
    ):
        bundle = broken if "kept.npz" in option else small_bundle
        assert main(["quantize", str(bundle.path), "out", *option.split(), "--no-report"]) == 1
        assert message in capsys.readouterr().err


def test_formats_of_layers_are_chosen_by_hand_and_bundles_compared(small_bundle, recordings, tmp_path, capsys):
    (tmp_path / "layers.json").write_text('{"ctc.ctc_lo": "int4", "encoder.embed": "fp16"}', encoding="utf-8")
    source, out, written = str(small_bundle.path), str(tmp_path / "out"), tmp_path / "changes.json"
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
    assert capsys.readouterr().out.startswith(
        f"{out} compared with {source}\non 3 recordings (0.wav, 1.wav, 2.wav), 4.4 s, "
    )
    assert json.loads(written.read_text(encoding="utf-8"))["divergence"]["value"] > 0
    assert main(["bench", "--divergence", source, source, *heard]) == 0
    assert "second pass 0.00%" in capsys.readouterr().out
    assert main(["bench", "--divergence", source]) == 2


@pytest.mark.slow
def test_a_calibration_is_kept_for_other_recipes(small_bundle, recordings, tmp_path, capsys):
    source, kept, speech = str(small_bundle.path), tmp_path / "kept.npz", tmp_path / "speech"
    options = ["--no-report", "--accept-damage"]
    speech.mkdir()
    shutil.copy(recordings[0], speech)
    keeping = ["--calibrate", str(speech), "--calibration", str(kept)]
    assert main(["quantize", source, str(tmp_path / "int8"), *keeping, *options]) == 0
    shown = capsys.readouterr().err
    for title in ("recognising recordings", "smoothing channels", "rounding encoder.onnx", "rounding decoder.onnx"):
        assert re.search(rf"{title}: #+\.* +\d+%, \d+:\d\d left", shown)
    shutil.rmtree(speech)
    files = []
    for number, given in enumerate((["--calibrate", str(recordings[0])], ["--calibration", str(kept)])):
        out = str(tmp_path / f"int4-{number}")
        assert main(["quantize", source, out, "--recipe", "int4-experts", *given, *options]) == 0
        files.append(Bundle.open(out).manifest.files)
    assert files[0] == files[1]
    assert shlex.join(["--calibration", str(kept), "--max-damage", "2"]) in capsys.readouterr().out.splitlines()[-1]
    limit = ["--recipe", "int8-experts", "--calibration", str(kept), "--max-divergence", "1", *options]
    assert main(["quantize", source, str(tmp_path / "limit"), *limit]) == 0
    assert (tmp_path / "kept.npz.damage.jsonl").stat().st_size > 0  # for other limits


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--recipe", "fp16"], ["--recipe", "int4", "--calibrate", "LIST"]])
def test_a_dry_run_says_the_sizes_that_are_written(options, small_bundle, recordings, tmp_path, capsys):
    source, out = small_bundle.path, tmp_path / "out"
    arguments = ["quantize", str(source), str(out), *(str(recordings[0]) if it == "LIST" else it for it in options)]
    assert main([*arguments, "--dry-run"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--no-report", "--accept-damage"]) == 0
    sizes = compare_bytes(Bundle.open(source), Bundle.open(out))
    assert last == f"would write {out} ({sizes['files']['after'] / 1e6:.1f} MB, without a report)"
    expected = {**sizes["groups"], "all files": sizes["files"]}
    assert {line[:24].strip(): line[24:].split()[:2] for line in table[1:]} == {
        name: [f"{size[when]:,}" for when in ("before", "after")] for name, size in expected.items()
    }
    assert sum(file.stat().st_size for file in out.iterdir() if file.name != "bundle.json") == sizes["files"]["after"]
