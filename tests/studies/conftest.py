"""Commands of studies, and lists of recordings for them."""

import pytest
import soundfile

from u2moe.benchmarks.results.files import read_json


@pytest.fixture
def study(tmp_path, capsys):
    """Return a function that runs the command of a study, which prints its tables, and returns the written results."""

    def run(module, *arguments, table="table"):
        module.main([*map(str, arguments), "--results", str(tmp_path / "results.json")])
        results = read_json(tmp_path / "results.json")
        assert module.values(results)[table] in capsys.readouterr().out
        return results

    return run


@pytest.fixture
def listed(tmp_path, sound):
    """Return a function that writes a list in which each text is said to be that of the same recording."""
    soundfile.write(tmp_path / "one.wav", sound, 16_000)

    def write(name, *texts):
        (tmp_path / name).write_text("".join(f"one.wav\t{text}\n" for text in texts), encoding="utf-8")
        return tmp_path / name

    return write
