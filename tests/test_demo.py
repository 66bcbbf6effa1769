"""The model and clips that ship are recognised; and a README that is true."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

from u2moe.runtime import Bundle, DecodingOptions, Recognizer
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.text.word_errors import WordErrors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "train_demo"
RECORDINGS = read_recordings(DEMO_FOLDER / "clips" / "transcripts.txt")
LARGEST_RATE = 0.3
"""Word errors allowed on the clips together: they were chosen among those that the model understands."""


@pytest.mark.parametrize(("chunk_size", "kernels"), [(None, None), (16, None), (16, "onnxruntime")])
def test_people_are_recognised(chunk_size, kernels):
    recognizer = Recognizer.from_pretrained(options=DecodingOptions(chunk_size=chunk_size), kernels=kernels)
    errors = WordErrors()
    for recording in RECORDINGS:
        errors.add(recording.transcript, recognizer.transcribe(recording.path).text)
    assert errors.num_words >= 10
    assert errors.rate <= LARGEST_RATE


def test_the_demo_is_small_and_pages_and_its_card_show_what_was_measured(monkeypatch):
    manifest = Bundle.open(DEMO_FOLDER).manifest
    assert manifest.quantization["recipe"] == "int8"
    assert sum(file.size for file in manifest.files.values()) <= 14e6
    network = manifest.architecture["encoder"]["feed_forward"]
    assert (network["num_experts"], network["num_experts_per_token"]) == (8, 2)
    monkeypatch.setattr("sys.argv", ["publish.py", "--check"])
    monkeypatch.syspath_prepend(RECIPE)
    runpy.run_path(str(RECIPE / "publish.py"), run_name="__main__")  # exits if a page is not up to date
    card = pytest.importorskip("huggingface_hub").ModelCard.load(ROOT / "runtime" / "demo" / "README.md")
    results = [result for result in card.data.eval_results if result.dataset_type != "private"]
    measured = json.loads((RECIPE / "results" / "wer.json").read_text(encoding="utf-8"))["int8"]["sets"]
    assert {result.dataset_type for result in results} == measured.keys() - {"heldout", "queen-dev"}
    assert {(result.task_type, result.metric_type) for result in results} == {("automatic-speech-recognition", "wer")}
    for result in results:
        mode = "full" if result.metric_name.endswith("full context") else "16"
        wer = measured[result.dataset_type][f"{mode} attention_rescoring"]["wer"]
        assert result.metric_value == round(100 * wer, 1)
    assert [result.metric_value for result in card.data.eval_results if result.dataset_type == "private"] == [41]


def test_readme_code_runs(monkeypatch, tmp_path, capsys):
    """Every Python block of the README, on a bundled clip; `microphone` gives it in pieces."""
    samples, rate = soundfile.read(RECORDINGS[0].path, dtype="float32")
    soundfile.write(tmp_path / "talk.wav", samples, rate)
    (tmp_path / "bundle").symlink_to(DEMO_FOLDER)
    monkeypatch.chdir(tmp_path)
    from u2moe.quantize.recordings import features_of  # noqa: PLC0415

    names = {
        "microphone": lambda: np.array_split(samples, 7),
        "features": features_of(Bundle.open(DEMO_FOLDER), [RECORDINGS[0].path])[0],
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert names["left_to_right"].shape == names["right_to_left"].shape == (len(names["hypotheses"]),)
