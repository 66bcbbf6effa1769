"""Checks of the options of `u2moe serve`."""

import pytest

from u2moe.runtime import cli


def test_the_key_may_be_in_a_file_or_in_the_environment(tmp_path, monkeypatch):
    def chosen(*arguments):
        launched = []
        monkeypatch.setattr("u2moe.runtime.server.launch.launch", lambda options, _: launched.append(options) or 0)
        assert cli.main(["serve", *arguments]) == 0
        return launched[0].api_key, launched[0].keys_file

    file = tmp_path / "key"
    monkeypatch.delenv("U2MOE_API_KEY", raising=False)
    assert chosen() == (None, None)
    monkeypatch.setenv("U2MOE_API_KEY", "from-the-environment")
    assert chosen() == ("from-the-environment", None)
    assert chosen("--api-key", str(file)) == (None, file)


def test_ports_that_are_taken_and_hotwords_that_cannot_be_read_are_named(tmp_path, capsys, server):
    (tmp_path / "names.txt").write_text("ALICE :much\n", encoding="utf-8")
    assert cli.main(["serve", "--port", "0", "--hotwords", str(tmp_path / "names.txt")]) == 1
    assert str(tmp_path / "names.txt") in capsys.readouterr().err
    port = server.ports["http"]
    assert cli.main(["serve", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--port", "70000"], "at most 65535"),
    (["--protocol", "vosk=1", "--protocol", "vosk=2"], "found vosk twice, expected different names"),
    (["--model", "a=x", "--model", "a=y"], "name models as BUNDLE or with --model, not both"),
    (["--tls-certificate", "no.pem", "--tls-key", "no.key"], "no.pem: no such file; TLS needs a PEM file"),
    (["--protocol", "grpc=1"], "must be one of wenet, sherpa, sherpa-offline, vosk, wyoming"),
    (["--protocol", "vosk"], "NAME=PORT"),
    (["--workers", "0"], "workers must be at least 1"),
    (["--capacity", "0"], "capacity must be at least 1"),
    (["--max-duration", "nan"], "duration_s must be"),
    (["--tls-key", "x"], "both the certificate and its key"),
    (["--host", "0.0.0.0", "--protocol", "wyoming=1", "--api-key", "KEYFILE"], "wyoming does not support API keys"),
    (["--api-key", "/dev/null"], "/dev/null: must be a regular file"),
    (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
])  # fmt: skip
def test_options_are_checked_before_the_model_is_loaded(arguments, complaint, tmp_path, capsys):
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    arguments = [str(tmp_path / "key") if argument == "KEYFILE" else argument for argument in arguments]
    assert cli.main(["serve", "no-bundle", *arguments]) == 1
    assert complaint in capsys.readouterr().err
