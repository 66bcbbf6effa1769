import json

import numpy as np
import soundfile

from u2moe.benchmarks.studies import hotwords
from u2moe.runtime import Transcript
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

RECORDINGS = [
    Recording(path="0", transcript="THE OLD HARBOUR LIES THERE"),
    Recording(path="1", transcript="THE OLD KITCHEN LIES THERE"),
    Recording(path="2", transcript="GARDEN HARBOUR KITCHEN"),
    *(Recording(path=str(number), transcript="THERE") for number in range(3, 6)),
]


class Hearer:
    """A fake recogniser that hears only "OLD" and the hotwords in `hears`."""

    vocabulary = Vocabulary(["<blank>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], TextConfig())

    def __init__(self, hears):
        self.hears = hears

    def transcribe(self, path, *, hotwords=None, grammar=None):
        if grammar or isinstance(hotwords, list):
            return Transcript(text=grammar.lines[0] if grammar else hotwords[0], duration=1800.0, segments=[])
        said = RECORDINGS[int(path)].transcript.split()
        named = [
            word
            for word, weight in (hotwords.hotwords if hotwords else ())
            if self.hears(word, said) and weight == 1.25
        ]
        return Transcript(text=" ".join(["OLD", *named]), duration=1.0, segments=[])


def test_names_are_counted_where_they_are_said_and_others_never_are():
    assert hotwords.rare_words(RECORDINGS)[:3] == [{"HARBOUR"}, {"KITCHEN"}, {"GARDEN", "HARBOUR", "KITCHEN"}]
    found = hotwords.measure(
        Hearer(lambda word, said: word in said), RECORDINGS, 1.25, hotwords.lists_of_each(RECORDINGS, 100)
    )
    assert (found["without"]["num_rare"], found["without"]["num_rare_found"]) == (5, 0)
    assert found["with"]["num_rare_found"] == 5
    assert found["with"]["num_false"] == found["unrelated"]["num_false"] == 0
    assert found["num_changed_by_unrelated"] == 0
    assert found["with"]["num_errors"] < found["without"]["num_errors"] == found["unrelated"]["num_errors"]
    found = hotwords.measure(
        Hearer(lambda word, said: word not in said), RECORDINGS, 1.25, hotwords.lists_of_each(RECORDINGS, 100)
    )
    assert found["with"]["num_rare_found"] == 0
    assert found["num_changed_by_unrelated"] == 5  # the third has no others
    assert found["unrelated"]["num_false"] == 2 + 2 + 3 * 3
    assert found["unrelated"]["num_errors"] > found["without"]["num_errors"]
    random = np.random.default_rng(0)
    drawn = hotwords.others([f"WORD{number}" for number in range(300)], {"WORD1", "WORD2"}, 100, random)
    assert len(set(drawn) - {"WORD1", "WORD2"}) == len(drawn) == 100


def test_long_lists_are_the_same_for_all_recordings_and_noise_as_loud_as_babble(tmp_path, sound):
    lists = hotwords.lists_of_all(RECORDINGS, 5, ["there", "window", "candle", "it", "<unk>", "ladder"])
    assert lists["with"] == ["GARDEN", "HARBOUR", "KITCHEN", *lists["unrelated"][:2]]
    assert sorted(lists["unrelated"]) == ["CANDLE", "LADDER", "WINDOW"]
    found = hotwords.measure(Hearer(lambda word, said: word in said), RECORDINGS, 1.25, lists)
    assert (found["num_listed"], found["with"]["num_rare_found"], found["with"]["num_false"]) == (5, 5, 0)
    assert found["times"] > 0
    soundfile.write(tmp_path / "a.wav", np.tile(sound, 5), 16_000)
    made = hotwords.noises([Recording(path=tmp_path / "a.wav", transcript="")])
    assert {kind: len(own) for kind, own in made.items()} == {"noise": 24, "babble": 24}
    assert {round(float(each.std()), 3) for own in made.values() for each in own} == {0.05}
    assert all(len(each) == 15 * hotwords.RATE for own in made.values() for each in own)


def test_the_report_of_the_command(bundle, sound, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    symbol = "".join(bundle.tokens[3:9])
    (tmp_path / "test.tsv").write_text(f"a.wav\t{symbol}\n", encoding="utf-8")
    file = tmp_path / "hotwords.json"
    hotwords.main([str(bundle.path), str(tmp_path / "test.tsv"), "--weight", "9", "--results", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["weight"] == 9
    assert {length: found["num_recordings"] for length, found in results["sets"]["test"].items()} == {"10": 1, "100": 1}
    assert hotwords.values(results)["table"] in capsys.readouterr().out


def test_commands_are_counted_in_each_condition():
    """The recogniser hears "OLD" without commands, and the first command with them."""
    said = [(recording.path, recording.transcript) for recording in RECORDINGS[:2]]
    found = hotwords.measure_commands(Hearer(lambda *_: False), RECORDINGS[2:], {"speech": said})
    assert found["num_groups"] == 1
    assert found["hours"] == {"speech": 1.0}
    assert found["conditions"]["without"] == {"num_errors": 4, "speech": 0}
    assert found["conditions"]["grammar"]["num_errors"] == found["conditions"]["hotwords"]["num_errors"] in (1, 3)
    assert found["conditions"]["with_rest"]["speech"] == 2 * (found["conditions"]["grammar"]["num_errors"] == 3)
    assert "grammar with [unk]" in hotwords.values({"commands": found})["commands"]


def test_memory_is_measured_for_each_length(monkeypatch, tmp_path):
    def peak(*arguments):
        listed = (
            arguments[arguments.index("--hotwords") + 1].read_text(encoding="utf-8")
            if "--hotwords" in arguments
            else ""
        )
        return len(listed.split()) * 10**6

    monkeypatch.setattr(hotwords, "peak_memory", peak)
    found = hotwords.measure_memory(tmp_path, RECORDINGS[0], [f"W{number}" for number in range(20_000)])
    assert found == {"0": 0, "1000": 10**9, "10000": 10**10}
    assert "| 10,000 | 10000 |" in hotwords.values({"memory": {"peaks": found}})["memory"]
