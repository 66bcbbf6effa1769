import dataclasses
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import transcribe

from u2moe.runtime import Recognizer, bundle_location, cli
from u2moe.runtime.cli.options import CommandParser, add_declared
from u2moe.runtime.declarations import option
from u2moe.runtime.installation import install_command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_a_bad_file_does_not_stop_the_others_and_the_library_is_silent(bundle, clips, capsys, caplog):
    (clips / "aa.wav").write_text("no audio")
    assert transcribe(bundle, clips, clips / "missing.wav") == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(clips / "a.wav"), str(clips / "b.wav")]
    assert "aa.wav: cannot be read as audio" in err
    assert "missing.wav: no such file" in err
    assert err.endswith("u2moe: error: 2 of 4 files failed\n")
    (clips / "model").symlink_to(bundle.path)
    with caplog.at_level(logging.DEBUG, "u2moe"):
        Recognizer.from_pretrained(clips / "model").transcribe(clips / "a.wav")
    assert re.search(r"loaded in .* s on CPUExecutionProvider", caplog.text)
    assert "a.wav: 16000 Hz, channels: 1, read by SoundFile" in caplog.text
    assert capsys.readouterr() == ("", "")
    for verbose in ([], ["--verbose"]):
        assert cli.main([*verbose, "transcribe", "--model", str(clips / "model"), str(clips / "a.wav")]) == 0
        assert ("loaded in" in capsys.readouterr().err) == bool(verbose)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--beam-size", "0"], "beam_size must be at least 1, got 0"),
    (["--providers", "RocketExecutionProvider"], "RocketExecutionProvider is not installed"),
    (["--num-threads", "1000000"], "num_threads must be at "),
    (["--raw", "s16le:8000:0"], "num_channels must be "),
    (["--providers", "CPUExecutionProvider,"], "--providers must be names separated by commas"),
    (["--hotwords", os.devnull], "contains no hotwords"),
    (["--hotwords", "missing"], "missing: "),
    (["--num-left-chunks", "4"], "--num-left-chunks needs --chunk-size or --stream"),
    (["-f", "events", "-o", "x"], "-f events is for stdout: leave out --output"),
    (["-f", "vtt", "b.wav"], "to write vtt for several recordings, name a folder with --output"),
    *((["-o", name, "b.wav"], f"{name}: is a single file") for name in ("talk.SRT", "talk.TextGrid", "talk.textgrid")),
    (["-o", "talk.srt", "b.wav"], "talk.srt: is a single file, but there are 2 recordings: name a folder"),
    (["-o", "a.wav/out"], "out: cannot be written: "),
    (["--model", "."], "bundle.json: missing"),
    (["--model", ""], "the name of the bundle is empty"),
    (["--model", "CHECKPOINT"], "is a WeNet checkpoint, not a bundle: run 'u2moe export CHECKPOINT BUNDLE' first"),
])  # fmt: skip
def test_errors_are_one_line(bundle, golden_checkpoint, clips, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(clips)
    checkpoint = str(golden_checkpoint("moe_tiny")) if "CHECKPOINT" in arguments else ""
    arguments = [argument.replace("CHECKPOINT", checkpoint) for argument in arguments]
    assert transcribe(bundle, *arguments, "a.wav") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("u2moe: error: ")
    assert message.replace("CHECKPOINT", checkpoint) in err
    assert err.count("\n") == 1


def test_bundled_model_and_clips_are_the_default(bundle, clips, capsys, monkeypatch):
    demo = clips / "demo"
    shutil.copytree(bundle.path, demo)
    (demo / "clips").mkdir()
    for name in ("a.wav", "b.wav"):
        (clips / name).rename(demo / "clips" / name)
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", demo)
    assert cli.main(["transcribe"]) == 0
    out, err = capsys.readouterr()
    assert [line.partition("\t")[0] for line in out.splitlines()] == ["a.wav", "b.wav"]
    assert err == "demo model; use --model BUNDLE for another\n"
    assert cli.main(["transcribe", "--model", "demo"]) == 0
    assert capsys.readouterr() == (out, "")


def without(packages, folder, *commands):
    """Run commands in a new process that cannot import some packages, with the demo model at `folder / "demo"`; return
    their exit statuses, the output before and the errors."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
        "from u2moe.runtime import bundle_location, cli\n"
        "from u2moe.runtime.cli import bundle\n"
        "bundle_location.DEMO_FOLDER = bundle_location.Path('demo').resolve()\n"
        "bundle.push_bundle = lambda folder, *_, **__: str(folder)\n"
        "print([cli.main(line.split()) for line in sys.stdin])"
    )
    command, pipes = [sys.executable, "-c", program, *packages], {"input": "\n".join(commands), "text": True}
    done = subprocess.run(command, cwd=folder, **pipes, capture_output=True, check=False)
    *out, statuses = done.stdout.splitlines()
    return json.loads(statuses), out, done.stderr.splitlines()


def test_demo_is_a_bundle_for_every_command_and_only_export_needs_torch(small_bundle, tmp_path):
    """As after pip install 'u2moe[cpu,tools]'. The last command replaces the bundle."""
    shutil.copytree(small_bundle.path, tmp_path / "demo")
    statuses, out, err = without(
        ("torch", "yaml"), tmp_path, "inspect demo", "validate demo", "push demo org/name",
        "quantize demo int8 --no-report --accept-damage", "convert demo one --profile streaming", "lm attach demo none",
    )  # fmt: skip
    assert statuses == [0] * 6, err
    assert sum(str(tmp_path / "demo") in line for line in out + err) >= 3
    assert {"int8", "one"} < {file.name for file in tmp_path.iterdir()}


def test_version_and_helps_with_what_few_need_apart(capsys):
    for arguments, expected in ((["--version"], f"u2moe {version('u2moe')}"), (["--help"], "transcribe")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
    for name, (module, function, _) in cli.COMMANDS.items():
        command = CommandParser()
        getattr(importlib.import_module(module), function)(command)
        options = command.format_help().partition("\noptions:\n")[2]
        basic, _, experts = options.partition("\nfor experts:\n")
        assert len(re.findall(r"^  -", basic, re.MULTILINE)) <= 9, name
        assert "--providers" not in basic, name
        assert "--threads" not in basic + experts, name  # one name for it: --num-threads


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "required: COMMAND"),
    (["dance"], "unknown command 'dance'"),
    (["transcibe"], "unknown command 'transcibe': did you mean transcribe?"),
    (["transcribe", "--beamsize", "3"], "unrecognized arguments: --beamsize: did you mean --beam-size?"),
    (["corpus", "score", "OUT", "--bye"], "unrecognized arguments: --bye: did you mean --by?"),
    (["transcribe", "--search", "viterbi"], "invalid choice: 'viterbi'"),
    (["transcribe", "--search", "ctc_gredy"], ": did you mean ctc_greedy?"),
    (["transcribe", "--format-text=fr"], "choose from"),
    (["lm", "trian"], ": did you mean train?"),
    (["transcribe", "https://host/a.wav"], "https://host/a.wav: is a URL, not a path: download it"),
    (["transcribe", ""], "argument FILE: a file name is empty"),
    *((["transcribe", "--raw", raw], f"ENCODING:HZ[:CHANNELS], such as s16le:16000, got {raw!r}")
      for raw in ("s16le", "mp3:16000", "s16le:x", "s16le:8000:2:3")),
])  # fmt: skip
def test_wrong_usage_is_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "usage: u2moe" in err
    assert message in err


def test_help_needs_nothing_that_computes_and_shows_percent_signs():
    program = (
        "import sys; sys.argv[1:] = []; from u2moe.__main__ import main; main()\n"
        "print(*(name for name in sys.modules if name.startswith('u2moe')), len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    names = done.stderr.split()
    assert (done.returncode, sorted(names[:-1])) == (0, ["u2moe", "u2moe.__main__", "u2moe.commands"])
    assert int(names[-1]) < 200  # with onnxruntime and numpy, there would be five times as many
    for name, (_, _, summary) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", done.stdout, re.MULTILINE)

    fields = [("part", int, option("integer", 2, flag="--part"))]
    about = "A share.\n\nAttributes:\n    part: at least 1 % of all.\n"
    parser = CommandParser(prog="it")
    add_declared(parser, dataclasses.make_dataclass("Share", fields, namespace={"__doc__": about}))
    assert "at least 1 % of all (default: 2)" in parser.format_help()


def test_every_hint_names_what_is_there_and_commands_what_is_not(capsys, monkeypatch):
    """Until u2moe is on an index, messages must not suggest its names. Each package that a command needs maps to an
    extra to install."""
    for part in ("kernels", "demo"):
        assert (ROOT / f"runtime/{part}/pyproject.toml").is_file()
        assert install_command(part) == f"pip install ./runtime/{part} (in a clone of u2moe)"
    assert install_command("cpu,server") == "pip install '.[cpu,server]' (in a clone of u2moe)"
    known = {*sys.stdlib_module_names, "numpy", "onnxruntime", "soundfile", "soxr", "u2moe", *cli.EXTRAS}
    known |= {"fsspec", "sounddevice", "u2moe_kernels"}  # their importers report what to install
    packages = PROJECT["tool"]["setuptools"]["package-dir"].values()
    commands = [package for package in packages if package == "benchmarks/bench" or "benchmarks" not in package]
    for file in ROOT.glob("[erqb]*/**/*.py"):
        text = file.read_text(encoding="utf-8")
        assert file.name == "installation.py" or "pip install u2moe" not in text.replace("'", ""), file
        named = re.findall(r"install_command\([\"']([a-z,]+)[\"']\)", text)
        assert set(",".join(named).split(",")) <= {"", "kernels", "demo", *EXTRAS}, file
        imported = set(re.findall(r"^ *(?:import|from(?= [\w.]+ import)) (\w+)", text, re.MULTILINE))
        assert file.parent.relative_to(ROOT).as_posix() not in commands or imported <= known, file
    assert set(cli.EXTRAS.values()) <= EXTRAS.keys()
    monkeypatch.setitem(cli.COMMANDS, "bench", ("u2moe.nothing.cli", "add_bench", "measure"))
    assert cli.main(["bench"]) == 1
    assert "'u2moe bench' needs the Python package u2moe.nothing, which is not installed" in capsys.readouterr().err


def test_an_extra_that_is_missing_is_named(bundle, tmp_path):
    """As after pip install 'u2moe[cpu]'."""
    commands = (
        "export . out", "convert demo out --profile sherpa-onnx", "validate demo --checkpoint .", "inspect demo",
        "quantize demo out",
    )  # fmt: skip
    (tmp_path / "demo").symlink_to(bundle.path)
    statuses, _, err = without(("torch", "onnx", "onnx_ir", "yaml"), tmp_path, *commands)
    assert statuses == [1] * len(commands), err
    expected = (
        r"u2moe: error: 'u2moe {}' needs the Python package "
        r"(torch|onnx_ir): pip install '\.\[(export|tools)\]' \(in a clone of u2moe\)"
    )
    for command, found in zip(commands, err, strict=True):
        assert re.fullmatch(expected.format(command.split()[0]), found)
    assert not (tmp_path / "out").exists()
