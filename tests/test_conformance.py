"""Cases that every runtime runs: Python's results, and at least one case for each of Python's options."""

import dataclasses
import functools
import json
import runpy
from pathlib import Path

import pytest
from conformance import COMPUTED, assert_same, clips, load, recognized_case, text_of

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, LanguageModelOptions, Recognizer, VadOptions
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.declarations import options_of
from u2moe.runtime.options import SEARCHES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", COMPUTED)
def test_python_gives_the_results_of_the_cases(kind, tmp_path):
    """After an intended change, tests/conformance/make_cases.py rewrites the cases."""
    content = load(kind)
    assert_same(kind, [COMPUTED[kind](case, content, tmp_path) for case in content["cases"]])


def test_other_languages_have_what_python_declares_and_every_option_a_case():
    """`python runtime/cpp/declared.py` updates the files."""
    for file, content in runpy.run_path(str(ROOT / "runtime" / "cpp" / "declared.py"))["written"]().items():
        assert file.read_text(encoding="utf-8") == content, file
    kinds = (EndpointConfig, EndpointRule, LanguageModelOptions, VadOptions)
    cases = "".join(map(text_of, (*COMPUTED, "recordings", "defaults")))
    assert [field.name for kind in kinds for field in dataclasses.fields(kind) if f'"{field.name}":' not in cases] == []
    searches = {case["search"] for case in load("search")["cases"]}
    searches |= {case["options"].get("search", "attention_rescoring") for case in load("recordings")["cases"]}
    assert searches == set(SEARCHES)


@pytest.mark.slow
def test_a_case_of_recordings_shows_every_option(tmp_path):
    """C++ and JavaScript, which must reproduce all cases, therefore cannot lack an option."""
    recognizer, samples = Recognizer.from_pretrained(), clips()

    @functools.cache
    def recognized(case):
        return recognized_case(recognizer, json.loads(case), samples, DEMO_FOLDER / "language.lm", tmp_path)

    def matters(name, case):
        fewer = {key: value for key, value in case["options"].items() if key != name}
        return recognized(json.dumps(case)) != recognized(json.dumps({**case, "options": fewer}))

    cases = [case for case in load("recordings")["cases"] if "vad" not in case["options"]]
    for name in options_of(DecodingOptions):
        assert any(name in case["options"] and matters(name, case) for case in cases), name
