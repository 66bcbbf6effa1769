"""Options from a TOML file, completion in shells, and what is logged."""

import logging
import os
import pty
import re
import select
import shutil
import subprocess
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


def test_completion_knows_all_commands_and_options(capsys):
    assert cli.main(["completion", "fish"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "-a transcribe -d 'recognise audio files'",
        "' -x -a 'attention_rescoring",
        "'json: one object per",
    ):
        assert expected in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def complete(*words):
        call = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _u2moe; printf "%s\\n" "${COMPREPLY[@]}"'
        command = ["bash", "--norc", "-c", f"{script}\n{call}", "bash", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert complete("u2moe", "tr") == ["transcribe"]
    assert complete("u2moe", "transcribe", "--be") == ["--beam-size"]
    assert complete("u2moe", "transcribe", "--search", "ctc") == ["ctc_prefix_beam", "ctc_greedy"]
    assert complete("u2moe", "listen", "--list") == ["--list-devices"]
    assert complete("u2moe", "transcribe", "--no-") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_names_with_spaces_in_bash(capsys, tmp_path):
    """The shell completes them, and quotes them: our function leaves names of files to it."""
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "my talk.wav").touch()
    (tmp_path / "rc").write_text(f"source {tmp_path}/script\nPS1='READY '\nbind 'set enable-bracketed-paste off'\n")
    bash = Shell(["bash", "--rcfile", "rc", "-i"], tmp_path)
    try:
        bash.say("", b"READY ")
        bash.say("show() { printf '<%s>' \"$@\"; echo END; }; complete -o default -F _u2moe show\n", b"READY ")
        assert "<transcribe><my talk.wav>" in bash.say("show transcribe my\t\n", b">END")
    finally:
        bash.end()


class Shell:
    """An interactive shell on a terminal."""

    def __init__(self, command, home):
        self.terminal, other_end = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "ZDOTDIR": str(home), "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=other_end, stdout=other_end, stderr=other_end, cwd=home, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(other_end)

    def say(self, text, until):
        """Type, and read until something is shown."""
        os.write(self.terminal, text.encode())
        shown = b""
        while until not in shown:
            assert select.select([self.terminal], [], [], 120)[0], shown
            shown += os.read(self.terminal, 65536)
        return shown.decode()

    def end(self):
        os.close(self.terminal)
        self.process.kill()
        self.process.wait()


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh: apt-get install zsh")
def test_completion_in_zsh(capsys, tmp_path):
    assert cli.main(["completion", "zsh"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "talk.wav").touch()
    (tmp_path / "my speech.wav").touch()
    zsh = Shell(["zsh", "-f", "-i"], tmp_path)
    prompt = b"\x1b[?2004h"  # of every command line
    try:
        zsh.say("", prompt)
        zsh.say("source ./script\n", prompt)
        zsh.say('show() { print -r -- "<$BUFFER>""END"; BUFFER= }; zle -N show; bindkey "^G" show\n', prompt)

        def complete(line):
            return re.search("<(.*?) ?>END", zsh.say(f"{line}\t\x07", b">END"))[1]

        assert complete("u2moe transc") == "u2moe transcribe"
        assert complete("u2moe transcribe --be") == "u2moe transcribe --beam-size"
        assert complete("u2moe transcribe --search ctc_g") == "u2moe transcribe --search ctc_greedy"
        assert complete("u2moe transcribe ta") == "u2moe transcribe talk.wav"
        assert complete("u2moe transcribe my") == r"u2moe transcribe my\ speech.wav"
    finally:
        zsh.end()


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish: apt-get install fish")
def test_completion_in_fish(capsys, tmp_path):
    assert cli.main(["completion", "fish"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "my speech.wav").touch()

    def complete(line):
        command = ["fish", "--no-config", "-c", f"source {tmp_path}/script; complete -C '{line}'"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return [item.split("\t")[0] for item in done.stdout.splitlines()]

    assert complete("u2moe tr") == ["transcribe"]
    assert complete("u2moe transcribe --be")[0] == "--beam-size"  # and what resembles it
    assert complete("u2moe transcribe --search ctc") == ["ctc_greedy", "ctc_prefix_beam"]
    assert complete("u2moe transcribe my") == ["my speech.wav"]  # which fish quotes as it puts it in


def test_the_library_is_silent_and_tells_what_it_does_if_asked(bundle, clip, capsys, caplog):
    with caplog.at_level(logging.DEBUG, "u2moe"):
        Recognizer.from_pretrained(bundle.path).transcribe(clip)
    assert re.search(r"loaded in .* s on CPUExecutionProvider", caplog.text)
    assert "a.wav: 16000 Hz, channels: 1, read by SoundFile" in caplog.text
    assert capsys.readouterr() == ("", "")
    for is_verbose in (False, True):
        assert cli.main(["transcribe", "--model", str(bundle.path), str(clip), *["--verbose"] * is_verbose]) == 0
        assert ("loaded in" in capsys.readouterr().err) == is_verbose
