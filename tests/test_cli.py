import ast
import dataclasses
import importlib
import itertools
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

import numpy as np
import pytest
import soundfile
from commands import transcribe

from u2moe.runtime import Recognizer, bundle_location, cli, format_transcript
from u2moe.runtime.cli import terminal
from u2moe.runtime.cli.options import CommandParser, add_declared
from u2moe.runtime.declarations import option
from u2moe.runtime.installation import install_command
from u2moe.runtime.text.formats import FORMATS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clips(tmp_path, sound):
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    soundfile.write(tmp_path / "b.flac", np.stack((sound, sound), axis=1)[::-1], 44_100)
    return tmp_path


def test_folder_as_json(bundle, recognizer, clips, capsys):
    assert transcribe(bundle, "-f", "json", "--search", "ctc_prefix_beam", "--beam-size", 3, clips) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == [str(clips / "a.wav"), str(clips / "b.flac")]
    assert set(lines[0]) == {"file", "text", "duration", "segments", "complete", "error"}
    assert set(lines[0]["segments"][0]["words"][0]) == {"word", "start", "end", "confidence"}
    assert len(lines[1]["segments"][0]["nbest"]) == 3
    assert err == ""


def test_output_folder_is_resumed(bundle, recognizer, clips, capsys):
    out = clips / "out"
    assert transcribe(bundle, "-f", "srt", "-o", out, clips / "a.wav") == 0
    expected = format_transcript(recognizer.transcribe(clips / "a.wav"), "srt")
    assert (out / "a.srt").read_text(encoding="utf-8") == expected
    (out / "a.srt").write_text("mine", encoding="utf-8")
    (clips / "c.wav").write_text("no audio")
    assert transcribe(bundle, "-f", "srt", "-o", out, clips / "a.wav", clips / "b.flac", clips / "c.wav") == 1
    assert sorted(written(out)) == ["a.srt", "b.srt"]
    assert (out / "a.srt").read_text(encoding="utf-8") == "mine"
    stdout, err = capsys.readouterr()
    assert stdout == ""
    assert err.startswith(f"1 of 3 are already in {out}: kept (remove them to recognise them again)\n")
    assert err.endswith("u2moe: error: 1 of 3 files failed\n")


def test_a_transcript_that_was_half_written_is_written_again(bundle, recognizer, clips, monkeypatch):
    """As in a power failure during a write: no file may look complete to the next run."""
    out = clips / "out"
    arguments = ["-f", "srt", "-o", out, clips / "a.wav"]
    write_bytes = Path.write_bytes

    def some(self, content):
        write_bytes(self, content[: len(content) // 2])
        raise SystemError("the power has failed")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", some)
        with pytest.raises(SystemError):
            transcribe(bundle, *arguments)
    assert transcribe(bundle, *arguments) == 0
    expected = format_transcript(recognizer.transcribe(clips / "a.wav"), "srt")
    assert written(out) == {"a.srt": expected}


def written(folder):
    """Return the content of the files in a folder, except hidden ones."""
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if not file.name.startswith(".")}


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_on_stdout(bundle, recognizer, clips, capsys, file_format):
    assert transcribe(bundle, "-f", file_format, clips / "a.wav") == 0
    transcript = recognizer.transcribe(clips / "a.wav")
    assert capsys.readouterr() == (format_transcript(transcript, file_format, name=str(clips / "a.wav")), "")


def test_outputs_that_would_be_lost_and_recordings_without_samples_are_errors(bundle, clips, capsys):
    assert transcribe(bundle, "-f", "vtt", clips) == 1
    assert "to write vtt for several recordings, name a folder with --output" in capsys.readouterr().err
    soundfile.write(clips / "none.wav", np.zeros(0), 16_000)
    for options in ([], ["--stream"]):
        assert transcribe(bundle, *options, clips / "none.wav") == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "none.wav: contains no samples" in err


def test_stream_shows_partial_results_and_hotwords_are_heard(bundle, recognizer, clips, capsys):
    symbol = next(s for s in bundle.tokens[3:] if s not in recognizer.transcribe(clips / "a.wav").text)
    (clips / "names").write_text(f"# one\n{symbol} :100\n", encoding="utf-8")
    assert transcribe(bundle, "--hotwords", clips / "names", clips / "a.wav") == 0
    assert symbol in capsys.readouterr().out
    (clips / "names").write_text("\u2603", encoding="utf-8")
    assert transcribe(bundle, "--hotwords", clips / "names", clips / "a.wav") == 1
    assert "hotword '\u2603': the vocabulary has no" in capsys.readouterr().err
    assert transcribe(bundle, "--hotwords", clips / "none", clips / "a.wav") == 1
    assert "none: " in capsys.readouterr().err
    assert transcribe(bundle, "--stream", "--chunk-size", 8, "--num-left-chunks", 4, clips / "a.wav") == 0
    out, err = capsys.readouterr()
    partials = err.splitlines()
    assert len(partials) > 3
    assert len(partials[0]) < len(partials[-1])
    assert transcribe(bundle, "--chunk-size", 8, "--num-left-chunks", 4, clips / "a.wav") == 0
    assert capsys.readouterr().out == out


def test_progress_and_partial_results_in_place_on_a_terminal(bundle, clips, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert transcribe(bundle, "--stream", clips) == 0
    err = capsys.readouterr().err
    assert "\r\x1b[K[1/2] " in err
    assert "\n" not in err
    shown = err.split("\r\x1b[K")
    partials = [text for text in shown if text and not text.startswith("[")]
    assert len(set(partials)) > 3
    # progress never replaces a partial result
    assert all(not text.startswith("[") or int(text.partition("%")[0].split()[-1]) < 100 for text in shown)
    followers = [after for before, after in itertools.pairwise(shown) if before in partials]
    assert not [after for after in followers if after.startswith("[1/2] ")]


def test_what_is_to_stay_stays_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    terminal.show_progress("a progress that is wider than the terminal")
    terminal.tell("a line that is wider than the terminal")
    terminal.show_latest("partial")
    assert capsys.readouterr().err == (
        "\r\x1b[Kr than the terminal\r\x1b[Ka line that is wider than the terminal\n\r\x1b[Kpartial"
    )


def test_a_bar_shows_how_far_all_files_are(bundle, clips, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (clips / "aa.wav").write_text("no audio")
    soundfile.write(clips / "long.wav", np.zeros(26 * 16_000), 16_000)
    assert transcribe(bundle, clips) == 1
    assert "#" not in capsys.readouterr().err  # only on a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert transcribe(bundle, clips) == 1
    drawn = [line.split(", ") for line in capsys.readouterr().err.split("\r\x1b[K") if line.startswith("[")]
    # 4, 0, 1.45 and 26 seconds; of the last ten at a time.
    assert drawn[0] == ["[1/4] ....................   0%", "a.wav"]
    begun = {line[-1]: line[0] for line in reversed(drawn)}
    assert [begun[name].split()[-1] for name in ("aa.wav", "b.flac", "long.wav")] == ["13%", "13%", "17%"]
    assert "[4/4] ##########..........  49%" in [line[0] for line in drawn]
    assert drawn[-1] == ["[4/4] #################### 100%", "0:00 left", "long.wav"]


def test_what_the_system_refuses_is_one_line(bundle, clips, capsys, monkeypatch):
    (clips / "file").touch()
    assert transcribe(bundle, "-o", clips / "file" / "out", clips / "a.wav") == 1
    assert capsys.readouterr().err.startswith("u2moe: error: [Errno ")

    def write_bytes(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", write_bytes)
    assert transcribe(bundle, "-o", clips / "out", clips) == 1  # stops after the first file
    assert (
        capsys.readouterr().err
        == f"u2moe: error: {clips / 'out' / 'a.txt'}: cannot be written: No space left on device\n"
    )
    assert written(clips / "out") == {}


def test_a_bad_file_does_not_stop_the_others_and_the_library_is_silent(bundle, clips, capsys, caplog):
    (clips / "aa.wav").write_text("no audio")
    assert transcribe(bundle, clips, clips / "missing.wav") == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(clips / "a.wav"), str(clips / "b.flac")]
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
    (["--num-left-chunks", "4"], "--num-left-chunks needs --chunk-size or --stream"),
    (["-f", "events", "-o", "x"], "-f events is for stdout: leave out --output"),
])  # fmt: skip
def test_errors_are_one_line(bundle, clips, capsys, arguments, message):
    assert transcribe(bundle, *arguments, clips / "a.wav") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("u2moe: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_no_bundle(tmp_path, golden_checkpoint, capsys):
    checkpoint = golden_checkpoint("moe_tiny")
    told = f"is a WeNet checkpoint, not a bundle: run 'u2moe export {checkpoint} BUNDLE' first"
    for folder, message in ((tmp_path, "bundle.json: missing"), (checkpoint, told)):
        assert cli.main(["transcribe", "--model", str(folder), "a.wav"]) == 1
        assert message in capsys.readouterr().err


def test_bundled_model_and_clips_are_the_default(bundle, clips, capsys, monkeypatch):
    (clips / "clips").mkdir()
    (clips / "a.wav").rename(clips / "clips" / "a.wav")
    demo = clips / "demo"
    shutil.copytree(bundle.path, demo)
    (clips / "clips").rename(demo / "clips")
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", demo)
    shutil.copy(demo / "clips" / "a.wav", demo / "clips" / "c.wav")
    assert cli.main(["transcribe"]) == 0
    out, err = capsys.readouterr()
    assert [line.partition("\t")[0] for line in out.splitlines()] == ["a.wav", "c.wav"]
    assert err == "demo model; use --model BUNDLE for another\n"
    assert cli.main(["transcribe", "--model", "demo"]) == 0
    assert capsys.readouterr() == (out, "")


def test_demo_is_a_bundle_for_every_command(small_bundle, tmp_path, capsys, monkeypatch):
    """Of all commands that accept a bundle."""
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", small_bundle.path)
    monkeypatch.setattr("u2moe.runtime.cli.bundle.push_bundle", lambda folder, *_, **__: str(folder))
    for arguments in (["inspect", "demo"], ["validate", "demo"], ["push", "demo", "org/name"]):
        assert cli.main(arguments) == 0
        assert str(small_bundle.path) in "".join(capsys.readouterr())
    assert cli.main(["quantize", "demo", str(tmp_path / "out"), "--no-report"]) == 0
    assert cli.main(["convert", "demo", str(tmp_path / "ort"), "--profile", "ort"]) == 0
    monkeypatch.setattr(bundle_location, "DEMO_FOLDER", tmp_path / "own")
    shutil.copytree(small_bundle.path, tmp_path / "own")  # it is replaced
    assert cli.main(["lm", "attach", "demo", "none"]) == 0


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


NOT_RAW = ("s16le", "mp3:16000", "s16le:x", "s16le:8000:2:3")


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments, message in (
        ([], "required: COMMAND"),
        (["dance"], "unknown command 'dance'"),
        (["transcibe"], "unknown command 'transcibe': did you mean transcribe?"),
        (["transcribe", "--beamsize", "3"], "unrecognized arguments: --beamsize: did you mean --beam-size?"),
        (["corpus", "score", "OUT", "--bye"], "unrecognized arguments: --bye: did you mean --by?"),
        (["transcribe", "--search", "viterbi"], "invalid choice: 'viterbi'"),
        (["transcribe", "--search", "ctc_gredy"], ": did you mean ctc_greedy?"),
        (["lm", "trian"], ": did you mean train?"),
        (["transcribe", "https://host/a.wav"], "https://host/a.wav: is a URL, not a path: download it"),
        (["transcribe", ""], "argument FILE: a file name is empty"),
        *(
            (["transcribe", "--raw", raw], f"ENCODING:HZ[:CHANNELS], such as s16le:16000, got {raw!r}")
            for raw in NOT_RAW
        ),
    ):
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

    @dataclasses.dataclass
    class Share:
        """A share.

        Attributes:
            part: at least 1 % of all.
        """

        part: int = option("integer", 2, flag="--part")

    parser = CommandParser(prog="it")
    add_declared(parser, Share)
    assert "at least 1 % of all (default: 2)" in parser.format_help()


def test_every_hint_names_what_is_there_and_commands_what_is_not(capsys, monkeypatch):
    """Until u2moe is on an index, messages must not suggest its names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for part in ("kernels", "demo"):
        assert (ROOT / f"runtime/{part}/pyproject.toml").is_file()
        assert install_command(part) == f"pip install ./runtime/{part} (in a clone of u2moe)"
    assert install_command("cpu,server") == "pip install '.[cpu,server]' (in a clone of u2moe)"
    for file in ROOT.glob("[erqb]*/**/*.py"):
        text = file.read_text(encoding="utf-8")
        assert file.name == "installation.py" or "pip install u2moe" not in text.replace("'", ""), file
        named = re.findall(r"install_command\([\"']([a-z,]+)[\"']\)", text)
        assert set(",".join(named).split(",")) <= {"", "kernels", "demo", *extras}, file
    monkeypatch.setitem(cli.COMMANDS, "bench", ("u2moe.nothing.cli", "add_bench", "measure"))
    assert cli.main(["bench"]) == 1
    assert "'u2moe bench' needs the Python package u2moe.nothing, which is not installed" in capsys.readouterr().err


def test_a_file_that_is_named_is_written_and_a_table_of_several_has_a_column_for_them(
    bundle, recognizer, clips, capsys
):
    out = clips / "texts" / "talk.srt"
    for _ in range(2):  # again: a file given by name is overwritten
        out.parent.mkdir(exist_ok=True)
        out.write_text("old", encoding="utf-8")
        assert transcribe(bundle, "-o", out, clips / "a.wav") == 0
        assert out.read_text(encoding="utf-8") == format_transcript(recognizer.transcribe(clips / "a.wav"), "srt")
    assert transcribe(bundle, "-o", out, clips) == 1
    assert "talk.srt: is a single file, but there are 2 recordings: name a folder" in capsys.readouterr().err
    assert transcribe(bundle, "-f", "tsv", clips) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["file", "start", "end", "text"]
    assert [row[0] for row in rows] == [str(clips / "a.wav"), str(clips / "b.flac")]
    assert all(len(row) == 4 for row in rows)


def test_every_package_that_may_be_missing_has_its_extra():
    """Each package that a command needs maps to an extra to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = {*sys.stdlib_module_names, "numpy", "onnxruntime", "soundfile", "soxr", "u2moe", *cli.EXTRAS}
    known |= {"fsspec", "sounddevice", "u2moe_kernels"}  # their importers report what to install
    for package in project["tool"]["setuptools"]["package-dir"].values():
        if package.startswith("benchmarks") and package != "benchmarks/bench":  # not commands
            continue
        for file in (ROOT / package).glob("*.py"):
            nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
            names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
            assert {name.partition(".")[0] for name in names} <= known, file
    assert set(cli.EXTRAS.values()) <= project["project"]["optional-dependencies"].keys()


def test_an_extra_that_is_missing_is_named(bundle, tmp_path):
    """As after pip install 'u2moe[cpu]', in a new process without the imports of other tests."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnx_ir', 'yaml')))\n"
        "from u2moe.runtime import cli\n"
        "print([cli.main(line.split()) for line in sys.stdin])"
    )
    out, commands = (
        tmp_path / "out",
        {
            "export": f"{tmp_path} OUT", "convert": f"{bundle.path} OUT --profile sherpa-onnx",
            "validate": f"{bundle.path} --checkpoint {tmp_path}", "inspect": bundle.path,
            "quantize": f"{bundle.path} OUT",
        },
    )  # fmt: skip
    lines = "".join(f"{name} {arguments}\n" for name, arguments in commands.items()).replace("OUT", str(out))
    done = subprocess.run([sys.executable, "-c", program], input=lines, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == str([1] * len(commands)), done.stderr
    expected = (
        r"u2moe: error: 'u2moe {}' needs the Python package "
        r"(torch|onnx_ir): pip install '\.\[(export|tools)\]' \(in a clone of u2moe\)"
    )
    for name, found in zip(commands, done.stderr.splitlines(), strict=True):
        assert re.fullmatch(expected.format(name), found)
    assert not out.exists()


def test_what_works_on_graphs_needs_no_torch(small_bundle, tmp_path):
    """As after pip install 'u2moe[cpu,tools]'."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'yaml')))\n"
        "from u2moe.runtime.cli import main\n"
        "bundle, out = sys.argv[1:]\n"
        "sys.exit(main(['inspect', bundle]) or main(['quantize', bundle, f'{out}/int8', '--no-report'])\n"
        "         or main(['convert', bundle, f'{out}/one', '--profile', 'streaming']))"
    )
    command = [sys.executable, "-c", program, str(small_bundle.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout


@pytest.mark.parametrize("has_command", [False, True])
def test_a_reader_that_goes_away_is_no_traceback(bundle, clips, has_command):
    arguments = ["transcribe", "--model", str(bundle.path), *[str(clips)] * 3] if has_command else []
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "u2moe", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert b"Traceback" not in done.stderr
    assert done.returncode == has_command
