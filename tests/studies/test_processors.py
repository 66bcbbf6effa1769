import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.studies.processors import _file_name, differences, main, values
from u2moe.quantize import RECIPES, quantize_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(exported, sound, tmp_path_factory):
    """What the command wrote about moe_tiny, with this processor as another."""
    folder = tmp_path_factory.mktemp("processors")
    quantize_bundle(exported("moe_tiny"), folder / "int8", RECIPES["int8"])
    for name, samples in (("one", sound), ("two", sound[:16_000])):
        soundfile.write(folder / f"{name}.wav", samples, 16000)
    (folder / "list.tsv").write_text("one.wav\tA B C\ntwo.wav\tD\n", encoding="utf-8")
    bundles = [f"--bundle=float32={exported('moe_tiny')}", f"--bundle=int8={folder / 'int8'}"]
    options = [f"--processor=twin={shlex.join([sys.executable])}", f"--manifest={folder / 'list.tsv'}"]
    assert main([*bundles, *options, f"--output={folder / 'found.json'}"]) == 0
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def test_the_reference_runs_here_alone_and_a_twin_differs_in_nothing(results):
    assert {bundle: list(found) for bundle, found in results["found"].items()} == {
        "float32": ["here"],
        "int8": ["here", "twin"],
    }
    for context in ("full context", "chunk 16"):
        here, twin = (results["found"]["int8"][name][context] for name in ("here", "twin"))
        assert here == twin
        assert (here["num_recordings"], here["num_words"], here["num_other_texts"]) == (2, 4, 0)
        assert here["here"] == {"mean": 0, "largest": 0, "divergence": 0}
        assert here["reference"]["largest"] > here["reference"]["mean"] > 0
        assert here["reference"]["divergence"] > 0


def test_pages_show_a_row_for_each_bundle_processor_and_context(results):
    shown = values(results)
    assert len(shown["table"].splitlines()) == 2 + 3 * 2
    assert (shown["num_recordings"], shown["num_words"], shown["other_texts"]) == ("2", "4", "0")
    assert 0 < float(shown["least"]) <= float(shown["most"])


def test_commands_are_kept_without_the_folders_of_a_machine(results):
    assert results["processors"]["twin"]["command"] == Path(sys.executable).name
    found = _file_name("PYTHONPATH=/one/site:/two/u2moe")
    assert found == "PYTHONPATH=site:u2moe"


def test_differences_are_means_over_all_frames():
    before = [np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))]
    after = [before[0], np.log(np.array([[0.5, 0.5], [0.5, 0.5]]))]
    found = differences(before, after)
    assert found["largest"] == pytest.approx(np.log(2), abs=1e-4)
    assert found["mean"] == pytest.approx((np.log(2) + np.log(1.5)) / 6, abs=1e-5)
    assert found["divergence"] == pytest.approx((0.25 * np.log(0.5) + 0.75 * np.log(1.5)) / 3, abs=1e-7)


def test_a_bundle_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        main(["--bundle", "folder"])
    assert "NAME=VALUE" in capsys.readouterr().err
