"""Options from a TOML file, and what is logged."""

import logging
import re
import sys

import pytest
import soundfile

from u2moe.runtime import Recognizer, cli
from u2moe.runtime.cli import configuration


@pytest.fixture
def clip(tmp_path, sound):
    soundfile.write(tmp_path / "a.wav", sound[:20_000], 16_000)
    return tmp_path / "a.wav"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that writes the default configuration file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "u2moe").mkdir(parents=True)
    file = tmp_path / "home" / "u2moe" / "config.toml"

    def write(text):
        file.write_text(text, encoding="utf-8")
        return file

    return write


def parsed(monkeypatch, *arguments):
    """What `u2moe transcribe` is called with."""
    seen = []
    monkeypatch.setattr("u2moe.runtime.cli.transcribe._check", lambda args: seen.append(args) or sys.exit(0))
    with pytest.raises(SystemExit):
        cli.main(["transcribe", *map(str, arguments)])
    return seen[0]


def test_options_are_defaults_of_the_command_line(config, monkeypatch, tmp_path):
    file = config(
        'beam-size = 4\nproviders = "CPUExecutionProvider"\n'
        '[transcribe]\nmodel = "bundle"\nhotwords = "~/names"\nstream = true\nctc-weight = 1\nmanifest = ["a", "b"]\n'
        "[listen]\nbeam-size = 2\n"
    )
    args = parsed(monkeypatch, "x.wav")
    assert (args.beam_size, args.providers, args.stream, args.ctc_weight) == (4, "CPUExecutionProvider", True, 1.0)
    assert args.model == file.parent / "bundle"
    assert args.hotwords.name == "names"
    assert args.hotwords.is_absolute()
    assert args.manifest == [str(file.parent / "a"), str(file.parent / "b")]
    assert parsed(monkeypatch, "--manifest", "c", "--manifest", "d").manifest == ["c", "d"]
    assert parsed(monkeypatch, "--manifest", "c").manifest == ["c"]  # the defaults are as they were
    assert parsed(monkeypatch, "--beam-size", "7").beam_size == 7
    (tmp_path / "other.toml").write_text("beam-size = 3", encoding="utf-8")
    for name in ("--config", "--conf"):
        other = parsed(monkeypatch, name, tmp_path / "other.toml")
        assert (other.beam_size, other.providers) == (3, None)


def test_json_lines_are_asked_for_although_a_format_is_configured(config, monkeypatch, tmp_path, capsys):
    config(f'[transcribe]\nformat = "srt"\noutput-dir = "{(tmp_path / "out").as_posix()}"\n')
    args = parsed(monkeypatch, "--json-lines", "x.wav")
    assert (args.json_lines, args.format, args.output_dir) == (True, "txt", None)
    assert cli.main(["transcribe", "--json-lines", "--format", "vtt", "x.wav"]) != 0
    assert "--json-lines is a format of its own" in capsys.readouterr().err


def test_flags_that_are_configured_can_be_taken_back(config, monkeypatch, capsys):
    config("verbose = true\n[transcribe]\nstream = true\nformat-text = true\n")
    args = parsed(monkeypatch, "x.wav", "--no-stream", "--no-format-text")
    assert (args.stream, args.format_text, args.verbose) == (False, False, True)
    assert parsed(monkeypatch, "x.wav", "--no-stream", "--stream").stream
    assert not parsed(monkeypatch, "x.wav", "--no-verbose").verbose
    assert not parsed(monkeypatch, "x.wav", "--no-vad").vad  # which nobody has set
    config("no-stream = true\n")
    assert cli.main(["transcribe", "x.wav"]) == 1
    assert "no-stream: there is no such option" in capsys.readouterr().err
    config("")
    with pytest.raises(SystemExit):
        cli.main(["transcribe", "--help"])
    assert "--no-stream" not in capsys.readouterr().out


def test_what_has_no_use_is_named_where_the_command_line_gives_it(config, capsys, tmp_path):
    report = tmp_path / "report.json"
    config("[bench]\nquick = true\nthreads = '2'\n")
    assert cli.main(["bench", "--report", str(report), "--threads", "3", "--chunk-sizes", "8"]) == 1
    assert "--report measures nothing, so that --threads, --chunk-sizes has no use" in capsys.readouterr().err
    assert cli.main(["transcribe", "--json-lines", "--format", "json", "-o", str(tmp_path / "out"), "x.wav"]) == 1
    assert "--json-lines is a format of its own, for stdout: leave out --format and --output-dir" in (
        capsys.readouterr().err
    )


def test_names_that_may_be_of_files_are_relative_to_the_configuration(config, monkeypatch):
    file = config('lm = "x.lm"\n[transcribe]\nmanifest = "s3://bucket/list.tsv"\n')
    args = parsed(monkeypatch, "x.wav")
    assert (args.lm, args.manifest) == (str(file.parent / "x.lm"), ["s3://bucket/list.tsv"])
    config('lm = "demo"\n')
    assert parsed(monkeypatch, "x.wav").lm == "demo"


def test_config_shows_what_is_set(config, capsys, tmp_path):
    assert cli.main(["config", "--config", str(tmp_path / "none.toml")]) == 1
    assert "none.toml: cannot be read as TOML: No such file" in capsys.readouterr().err
    assert cli.main(["config"]) == 0
    assert re.match(r"no options are set: .*config\.toml does not exist\n", capsys.readouterr().out)
    text = 'beam-size = 4\n\n[transcribe]\nstream = true\nsearch = "ctc_greedy"\n\n[serve]\nport = 1234\n'
    file = config(text)
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == f"# {file}\n{text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beam-size = ", "cannot be read as TOML: Invalid value"),
        (
            "[transcribe]\nbeamsize = 3",
            r"\[transcribe\] beamsize: there is no such option, expected one of beam-size, ",
        ),
        ("a = " + "[" * 100_000, "cannot be read as TOML"),
        ("beamsize = 3", "config.toml: beamsize: there is no such option"),
        ("[transcribe]\nbeam-size = 'x'", r"\[transcribe\] beam-size: 'x' is not possible: invalid literal"),
        ("[transcribe]\nbeam-size = [3]", "beam-size must be text or a number"),
        ("[transcribe]\nbeam-size = true", "beam-size must be text or a number"),
        ("[transcribe]\nsearch = 'viterbi'", "search must be one of attention_rescoring, .*, got 'viterbi'"),
        ("[transcribe]\nstream = 1", "stream must be true or false"),
        ("transcribe = 1", "transcribe: there is no such option"),
        (
            "[transcibe]\nstream = true",
            r"\[transcibe\]: there is no such command, expected one of transcribe, ",
        ),
    ],
)
def test_files_that_are_refused_name_the_option(config, clip, capsys, text, message):
    file = config(text)
    assert cli.main(["transcribe", str(clip)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"u2moe: error: {file}: ")
    assert re.search(message, err)


def test_an_option_for_all_commands_may_be_one_of_another(config, monkeypatch, capsys):
    """A command that is not loaded is asked, too."""
    file = config("\ufeffport = 1234\nbeam-size = 4\n")
    assert parsed(monkeypatch, "x.wav").beam_size == 4
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == f"# {file}\nport = 1234\nbeam-size = 4\n"


def test_no_home_folder(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert configuration.default_file() is None


def test_the_library_is_silent_and_tells_what_it_does_if_asked(bundle, clip, capsys, caplog):
    with caplog.at_level(logging.DEBUG, "u2moe"):
        Recognizer.from_pretrained(bundle.path).transcribe(clip)
    assert re.search(r"loaded in .* s on CPUExecutionProvider", caplog.text)
    assert "a.wav: 16000 Hz, channels: 1, read by SoundFile" in caplog.text
    assert capsys.readouterr() == ("", "")
    for is_verbose in (False, True):
        assert cli.main(["transcribe", "--model", str(bundle.path), str(clip), *["--verbose"] * is_verbose]) == 0
        assert ("loaded in" in capsys.readouterr().err) == is_verbose
