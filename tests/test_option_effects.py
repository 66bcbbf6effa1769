"""Every declared decoding option changes results: in Python, as a default of a bundle, and as a flag.
`tests/server/test_models.py` tests clients of the server, `tests/conformance` the other runtimes."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import soundfile
from manifests import with_decoding

from u2moe.quantize import comparison, damage
from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Grammar, Recognizer, TextFormat, cli
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.declarations import options_of
from u2moe.runtime.decoding import language_model_weights
from u2moe.runtime.model.features import fbank
from u2moe.runtime.options import BUNDLED, RescoringOptions

OTHERS = {
    "search": "ctc_greedy",
    "beam_size": 3,
    "ctc_weight": 2.0,
    "reverse_weight": 0.0,
    "length_penalty": 3.0,
    "chunk_size": 8,
    "num_left_chunks": 0,
    "endpoint": EndpointConfig(rule3=EndpointRule(min_utterance_length=0.5)),
    "language_model": "none",
    "padding_s": 0.5,
    "blank_penalty": 4.0,
    "grammar": Grammar(lines=("back to work", "[unk]")),
    "text_format": TextFormat(),
}
"""A value other than the default for each option. A new option without one fails a test."""
BESIDE = {
    "length_penalty": {"search": "attention"}, "num_left_chunks": {"chunk_size": 4}, "endpoint": {"chunk_size": 16},
}  # fmt: skip
"""Other options that must be set for an option to take effect."""
VALUES = {"--lm": ["none"], "--format-text": [], "--grammar": [str(Path(__file__).parent / "toys" / "commands.txt")]}
OPTIONS = options_of(DecodingOptions)


@pytest.fixture(scope="module")
def demo():
    return Recognizer.from_pretrained()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, demo):
    file = next(DEMO_FOLDER.glob("clips/*.flac"))
    samples = read_audio(file, 16_000)[4_000:52_000]  # begins in the middle of a sound
    cut = tmp_path_factory.mktemp("clip") / "cut.wav"
    soundfile.write(cut, samples, 16_000)
    return cut


@pytest.fixture(scope="module")
def transcribed(demo, clip):
    return functools.cache(lambda options: demo.transcribe(clip, options=options))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_results(demo, clip, transcribed, name, capsys, monkeypatch):
    """Also as default of a bundle, and as flag."""
    before = DecodingOptions(**BESIDE.get(name, {}))
    expected = transcribed(dataclasses.replace(before, **{name: OTHERS[name]}))
    assert expected != transcribed(before)
    if OPTIONS[name].in_bundle:
        bundle, value = copy.copy(demo.bundle), None if name == "language_model" else OTHERS[name]
        bundle.manifest = with_decoding(bundle.manifest, **{name: value})
        assert Recognizer(bundle, demo.model).transcribe(clip, options=before) == expected
    if OPTIONS[name].flag:
        monkeypatch.setattr(Recognizer, "load", lambda *_, **chosen: Recognizer(demo.bundle, demo.model, **chosen))
        chosen = {**BESIDE.get(name, {}), name: OTHERS[name]}
        given = {OPTIONS[other].flag: [str(value)] for other, value in chosen.items()}
        flags = [part for flag, values in given.items() for part in (flag, *VALUES.get(flag, values))]
        assert cli.main(["transcribe", str(clip), "-f", "json", *flags]) == 0
        found = {"file": str(clip), **dataclasses.asdict(expected)}
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_turn_moves_the_ends_of_utterances_by_a_language_model(demo, clip):
    rule2 = EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.36)
    before = DecodingOptions(chunk_size=16, endpoint=EndpointConfig(rule2=rule2))
    after = dataclasses.replace(before, endpoint=EndpointConfig(rule2=rule2, turn=1e-6))
    assert demo.transcribe(clip, options=after) != demo.transcribe(clip, options=before)
    alone = [dataclasses.replace(each, language_model="none") for each in (before, after)]
    assert demo.transcribe(clip, options=alone[0]) == demo.transcribe(clip, options=alone[1])


@pytest.mark.parametrize("command", ["transcribe", "listen", "corpus", "serve", "lm tune"])
def test_no_command_lacks_the_options_of_bundles(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert all(declared.flag in said for declared in BUNDLED.values() if declared.flag)
    own = {"listen": "as in training, or 16", "transcribe": "full context; with --stream"}.get(command, "")
    assert f"encoder frames per chunk (default: {own}" * bool(own) in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", options_of(RescoringOptions))
def test_loops_that_search_again_have_all_weights_of_the_bundle(name, recognizer, sound, monkeypatch):
    """These loops are tuning of language models, and measuring the damage of quantization."""
    bundle, used = copy.copy(recognizer.bundle), []
    bundle.manifest = with_decoding(bundle.manifest, **{name: OTHERS[name]})

    def rescoring(hypotheses, _scores, weights):
        used.append(getattr(weights, name))
        return [type("Rescored", (), {"hypothesis": hypotheses[0]})]

    for module in (comparison, language_model_weights):
        monkeypatch.setattr(module, "attention_rescoring", rescoring)
    recordings = language_model_weights.EncodedRecordings(bundle, recognizer.model)
    recordings.add("A", sound)
    recordings.texts(None, second_pass=True)
    damage.DamageMeter([bundle, bundle], [fbank(sound, bundle.manifest.features)])
    assert used
    assert set(used) == {OTHERS[name]}
