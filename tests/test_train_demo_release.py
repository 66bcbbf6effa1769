"""What follows from a checkpoint of the demo's recipe: stages, word errors, tables, the proof beside a dense twin."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import json
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
import numpy as np
import soundfile
import torch

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
sys.path.insert(0, str(RECIPE))
import calibration
import checkpoints
import corpus
import evaluate
import experts
import games
import peers
import phones
import prepare
import progress
import proof
import specialists
import stages
import tables
import upcycle
import yaml

from u2moe.export import Checkpoint
from u2moe.export.model import SpeechModel
from u2moe.export.training_config import parse_training_config
from u2moe.runtime.corpus.word_errors import read_manifest
from u2moe.runtime.language.model import LanguageModelOptions

CONDITIONS = [
    f"{chunk} {search}{mode}"
    for chunk in ("full", "16", "8")
    for mode in ("", tables.WIDE, tables.GUIDED, tables.GUIDED + tables.WIDE)
    for search in evaluate.SEARCHES
]


@pytest.fixture
def work(tmp_path):
    """Two stages, the second of which reads what the first makes; and the names of those that ran."""
    (tmp_path / "source").write_text("a")
    ran = []

    def stage(name, read, made):
        def do():
            ran.append(name)
            (tmp_path / made).write_text((tmp_path / read).read_text() * 2)

        return stages.Stage(name=name, work=do, reads=[tmp_path / read], makes=[tmp_path / made])

    chain = [stage("first", "source", "middle"), stage("second", "middle", "end")]

    def run():
        ran.clear()
        for stage in chain:
            stages.run(stage, tmp_path / "done", lambda _: None)
        return list(ran)

    return tmp_path, run


def test_stages_are_done_once(work):
    folder, run = work
    assert run() == ["first", "second"]
    assert (folder / "end").read_text() == "aaaa"
    assert run() == []


def test_stages_are_done_again_when_something_has_changed(work):
    folder, run = work
    run()
    (folder / "source").write_text("b")
    assert run() == ["first", "second"]
    (folder / "end").write_text("by hand")
    assert run() == ["second"]
    (folder / "middle").unlink()
    assert run() == ["first"]  # which makes what it made before


def test_an_error_of_one_stage_waits_for_the_others(tmp_path):
    def stage(name, work):
        return stages.Stage(name=name, work=work, reads=[], makes=[])

    ended = []
    together = [stage("broken", lambda: 1 / 0), stage("whole", lambda: ended.append("whole"))]
    with pytest.raises(ZeroDivisionError):
        stages.run_together(together, tmp_path / "done", lambda _: None)
    assert ended == ["whole"]
    assert [file.stem for file in (tmp_path / "done").iterdir()] == ["whole"]


def test_a_stage_that_fails_is_not_done(work, tmp_path):
    stage = stages.Stage(name="empty", work=lambda: None, reads=[], makes=[tmp_path / "missing"])
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"empty: did not make .*missing"):
            stages.run(stage, tmp_path / "done", lambda _: None)


@pytest.fixture
def manifest(clips):
    file = clips / "set.tsv"
    file.write_text("a.wav\tONE TWO\nb.wav\tTHREE\n")
    return file


def test_a_set_is_heard_once_and_again_with_another_list(bundle, manifest, tmp_path, monkeypatch):
    search, searched = evaluate.ctc_prefix_beam_search, []

    def noted(log_probs, beam_size, blank, fusion):
        searched.append((beam_size, fusion is not None))
        return search(log_probs, beam_size, blank, fusion=fusion)

    rescored, factors = evaluate.attention_rescoring, []
    monkeypatch.setattr(evaluate, "ctc_prefix_beam_search", noted)
    monkeypatch.setattr(evaluate, "attention_rescoring", lambda *given: factors.append(given[-1]) or rescored(*given))
    found = evaluate.hear_set(bundle.path, manifest, tmp_path / "heard.json", [*evaluate.MODES])
    of_recording = len(evaluate.CHUNK_SIZES) * [(10, False), (40, False), (10, True), (40, True)]
    assert searched == 2 * of_recording  # in the order of CONDITIONS
    guided = LanguageModelOptions.demo().rescoring_weight
    assert factors == [guided if with_model else 1.0 for _, with_model in searched]
    assert [recording["name"] for recording in found["recordings"]] == ["a.wav", "b.wav"]
    assert [heard["condition"] for heard in found["recordings"][0]["heard"]] == CONDITIONS
    assert found["audio_s"] == pytest.approx(8)
    manifest.write_text("a.wav\tONE TWO\n")
    assert len(evaluate.hear_set(bundle.path, manifest, tmp_path / "heard.json")["recordings"]) == 1
    monkeypatch.setattr(evaluate, "Listener", None)
    assert len(evaluate.hear_set(bundle.path, manifest, tmp_path / "heard.json")["recordings"]) == 1


def heard(transcript, *texts):
    conditions = [{"condition": name, "text": text, "cpu_s": 0.1} for name, text in zip("xy", texts, strict=True)]
    return {"name": "a", "transcript": transcript, "heard": conditions}


def test_scores_count_words_and_time():
    content = {"audio_s": 10.0, "recordings": [heard("ONE TWO", "ONE TWO", "ONE"), heard("TWO", "TOO", "TWO TWO")]}
    found = evaluate.scores(content)
    assert found["x"]["wer"] == pytest.approx(1 / 3, abs=1e-6)
    assert (found["x"]["num_exact"], found["y"]["num_exact"], found["y"]["num_errors"]) == (1, 0, 2)
    assert found["x"]["interval"][0] < found["x"]["wer"] < found["x"]["interval"][1]
    assert (found["x"]["cpu_s"], found["x"]["audio_s"]) == (0.2, 10.0)


def test_silences_say_nothing_by_themselves(bundle):
    levels = [float(abs(samples).max()) for _, samples in evaluate.silences(16_000)]
    assert min(levels) == 0
    assert 0 < max(levels) < 0.1
    assert set(evaluate.words_in_silence(bundle.path)) == set(CONDITIONS)


def test_recognisers_are_given_what_they_have_not_heard(manifest, tmp_path):
    class Process:
        asked = 0

        def recognise(self, wav, portion_s):
            assert soundfile.info(wav).duration < portion_s
            Process.asked += 1
            return {"text": "1,  2\n"}

    recordings = read_manifest(manifest)
    for _ in range(2):
        texts = peers.hear("x", Process(), recordings, tmp_path)
    assert Process.asked == 2
    counted = peers.count(recordings, texts)
    assert (counted.num_errors, counted.num_words) == (2, 3)  # "1, 2" is ONE TWO, and two errors for THREE


def test_a_difference_is_that_of_the_same_utterances():
    worse, better = [(3, 10), (1, 5), (2, 5)] * 20, [(1, 10), (1, 5), (0, 5)] * 20
    found = proof.difference(better, worse)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["interval"][0] < -0.2 < found["interval"][1] < 0
    assert proof.difference(worse, worse) == {"difference": 0, "interval": [0, 0]}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A work directory with a small dense run of no steps, and the mixture of experts made out of it."""
    folder = tmp_path_factory.mktemp("exp")
    prepare.write_vocabulary(["GO FORWARD TEN METERS", "OPEN THE KITCHEN DOOR"] * 20, folder, num_pieces=30)
    config = yaml.safe_load((RECIPE / "dense.yaml").read_text(encoding="utf-8"))
    config["encoder_conf"] |= {"output_size": 16, "linear_units": 32, "num_blocks": 1}
    config["decoder_conf"] |= {"linear_units": 32}
    num_units = len((folder / "units.txt").read_text().splitlines())
    sizes = {"input_dim": 80, "output_dim": num_units, "vocab_size": num_units}
    (folder / "dense").mkdir()
    (folder / "dense" / "train.yaml").write_text(yaml.safe_dump(config | sizes))
    torch.manual_seed(1)
    model = SpeechModel(parse_training_config(config | sizes).architecture)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    state = {
        "optimizer": {"masters": weights, "average": weights, "parts": None},
        "progress": vars(progress.Progress()), "options": vars(progress.Options()),
        "statistics": {"mean_stat": [0.0] * 80, "var_stat": [10.0] * 80, "frame_num": 10},
    }  # fmt: skip
    checkpoints.save(state, folder / "dense", 0)
    layers = [name.removesuffix(".w_1.weight") for name in weights if name.endswith(".w_1.weight")]
    generator = torch.Generator().manual_seed(1)
    rows = {layer: torch.randn(4, 16, generator=generator) for layer in layers}
    mixture = upcycle.upcycled(weights, rows, 0.05, generator)
    (folder / "mixture").mkdir()
    mixed = upcycle.mixture_config(config | sizes)
    (folder / "mixture" / "train.yaml").write_text(yaml.safe_dump(mixed))
    parts = {"masters": mixture, "average": mixture, "parts": None}
    checkpoints.save(state | {"optimizer": parts}, folder / "mixture", 0)
    return folder


@pytest.fixture(scope="module")
def listed(twins, sound):
    """The work directory with lists of two recordings of noise for each test set."""
    for kind, names in (("test", tables.SETS), ("dev", ["queen-dev"])):
        (twins / kind).mkdir()
        for name in names:
            for number in (1, 2):
                soundfile.write(twins / kind / f"{number}.wav", sound[: number * 16_000], 16_000)
            (twins / kind / f"{name}.tsv").write_text("1.wav\tGO FORWARD\n2.wav\tOPEN THE DOOR\n")
    return twins


@pytest.mark.slow
def test_the_proof_compares_twins(listed, monkeypatch, tmp_path):
    arguments = [str(listed / "mixture"), str(listed / "dense"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["proof.py", *arguments])
    monkeypatch.setattr(proof, "NUM_TIMED", 1)
    proof.main()
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["bytes"]["mixture int8"] > found["bytes"]["dense int8"]
    assert found["sets"].keys() == tables.SETS.keys()
    assert all(factor > 0 for own in found["rtf"].values() for factor in own.values())
    table = tables.proof_table(found)
    assert table.startswith("After 0 steps: 0.0 hours of the dense network")
    assert table.count("| word errors, ") == len(tables.SETS)
    state = checkpoints.load(checkpoints.all_of(listed / "mixture")[-1])
    state["progress"]["step"] = 5
    checkpoints.save(state, listed / "mixture", 5)
    with pytest.raises(SystemExit, match="same number of steps, found mixture 5, dense 0"):
        proof.main()


@pytest.fixture(scope="module")
def directory(listed):
    """The mixture as a WeNet directory."""
    import wenet  # noqa: PLC0415

    folder = listed / "wenet"
    path = str(checkpoints.all_of(listed / "mixture")[0])
    arguments = ["--work-dir", str(listed), "--name", "mixture", "--checkpoint", path, "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wenet.py", *arguments])
        wenet.main()
    return folder


@pytest.mark.slow
def test_shares_of_experts_are_those_of_every_layer(listed, directory):
    shares = experts.usage(
        Checkpoint.open(directory), experts.Tokenizer(directory), read_manifest(listed / "test" / "saytime.tsv")
    )
    assert len(shares) == 4  # two in a block of the encoder, one in each decoder
    for own in shares.values():
        assert sum(own) == pytest.approx(1, abs=1e-3)
        assert own[::2] == own[1::2]  # the parts of a copy are chosen together, as long as nothing is trained


@pytest.mark.slow
def test_what_experts_specialise_in_is_told_by_layer(listed, directory, monkeypatch, tmp_path):
    arguments = ["--checkpoint", str(directory), "--work-dir", str(listed), "--output", str(tmp_path)]
    (tmp_path / "queen.tsv").write_text("clip\tspeaker_group\tsplit\n1.SB\tJOE\ttest\n2.SB\tLOLA\ttest\n")
    (listed / "test" / "queen-test.tsv").write_text("1.wav\tGO FORWARD\n2.wav\tOPEN THE DOOR\n1.wav\tUNKNOWN\n")
    spoken = {"GO FORWARD": ["G", "OW"] * 50, "OPEN THE DOOR": ["SIL"] * 200}
    monkeypatch.setattr(
        specialists,
        "Aligner",
        lambda: types.SimpleNamespace(phones=lambda _samples, transcript: spoken.get(transcript)),
    )
    monkeypatch.setattr(games, "TABLES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["specialists.py", *arguments])
    specialists.main()
    found = json.loads((tmp_path / "specialists.json").read_text())
    assert found["num_recordings"] == 2  # the third cannot be aligned
    assert len(found["layers"]) == 2
    assert all(0 <= own["bits"] <= 3 for layer in found["layers"].values() for own in layer.values())
    shares = found["best"]["phones"]
    assert sum(shares["SIL"]) == pytest.approx(1, abs=1e-3)
    assert sum(shares["M"]) == 0  # never said


def test_bits_are_those_that_rows_say_of_columns():
    assert specialists.information(np.eye(8, dtype=np.int64)) == pytest.approx(3)
    assert specialists.information(np.full((4, 6), 7)) == pytest.approx(0)
    table = specialists.counts(np.array([[0, 1], [1, 2]]), np.array([1, 0]), 3, 2)
    assert table.tolist() == [[0, 1], [1, 1], [1, 0]]


def test_chance_is_what_choices_hold_of_another_recording():
    def heard(label):
        expert = np.full((30, 1), label)
        return specialists.Heard(experts={"x": expert}, labels={"speaker": np.full(30, label)})

    tables = specialists.tables_of([heard(0), heard(0), heard(1), heard(1)], "x", "speaker")
    assert tables.bits() == {"bits": 1.0, "chance": 0.0}  # half of the neighbours are the same speaker


def test_bands_leave_out_other_frequencies():
    seconds = np.arange(16_000) / 16_000
    low, high = (np.sin(2 * np.pi * pitch * seconds).astype(np.float32) for pitch in (1000, 5000))
    assert np.abs(specialists.in_band(low + high, (300, 3400)) - low).max() < 1e-4
    assert specialists.in_band(low, None) is low


def test_words_and_phones_are_told_frame_by_frame(monkeypatch):
    heard = []

    class Decoder:
        def __init__(self, **_options):
            self.start_utt = self.end_utt = lambda: None

        def process_raw(self, pcm, *, full_utt):
            assert full_utt
            heard.append(len(pcm))

        def set_align_text(self, text):
            if "xyzzy" in text:
                raise RuntimeError("no such word")

        def seg(self):
            part = types.SimpleNamespace
            yield part(word="<sil>", start_frame=0, end_frame=19)
            yield part(word="go(2)", start_frame=20, end_frame=54)

        def set_alignment(self):
            assert heard == [16_000]  # the words were aligned before

        def get_alignment(self):
            phone = types.SimpleNamespace
            yield [phone(name="+BREATH+", start=0, duration=20)]
            yield [phone(name="G", start=20, duration=10), phone(name="OW", start=30, duration=25)]

    monkeypatch.setitem(sys.modules, "pocketsphinx", types.SimpleNamespace(Decoder=Decoder))
    samples = np.zeros(8000, np.float32)
    aligner = phones.Aligner()
    assert aligner.phones(samples, "GO") == ["SIL"] * 20 + ["G"] * 10 + ["OW"] * 20
    assert aligner.words(samples, "GO") == [phones.Stretch(None, 0, 20), phones.Stretch("GO", 20, 55)]
    assert aligner.phones(samples, "XYZZY") is None
    monkeypatch.setattr(Decoder, "seg", lambda _: None)  # nothing fits
    assert aligner.words(samples, "GO") is None


def test_tables_show_peers_and_intervals():
    found = {"wer": 0.25, "interval": [0.2, 0.31], "num_utterances": 4, "num_words": 20, "cpu_s": 1.0, "audio_s": 50.0}
    wide = {**found, "wer": 0.24, "cpu_s": 2.0}
    conditions = {name: wide if name.endswith(tables.WIDE) else found for name in CONDITIONS}
    sets = dict.fromkeys(tables.SETS, conditions)
    results = {name: {"sets": sets, "silence": {"x": []}} for name in ("int8", "float32")}
    table = tables.wer_table(results, {"p": {"title": "Peer", "sets": {"saytime": found}}})
    assert table.count("| demo model | 25.0% (20-31) |") == len(tables.SETS)
    assert table.count("| Peer | 25.0% (20-31) |") == 1
    assert tables.silence(results) == "no words in any of them"
    assert table.count("| with a beam of 40 | 24.0% (20-31) |") == len(tables.SETS)
    assert table.count("| with `--lm demo` | 25.0% (20-31) |") == len(tables.SETS)
    times = tables.real_time_factors(results)
    assert times.startswith("0.0200 and 0.0200 of real time")
    assert times.endswith("0.0200 and 0.0200 with the language model and 0.0400 and 0.0400 with both")
    results["int8"]["silence"]["x"] = ["hum: A"]
    assert tables.silence(results) == "words in 1 of them"
    assert tables.rare_experts({"a": [0.01, 0.99], "b": [0.5, 0.5]}) == "1 of 4"


def test_calibration_recordings_are_spread_over_the_packs(tmp_path, monkeypatch):
    for name in calibration.PACKS:
        with corpus.Pack(tmp_path / "speech" / name, corpus.SPEECH) as pack:
            for number in range(12):
                pack.append(np.full(16_000, 100 * number, np.int16), "voice", f"NUMBER {number}")
    monkeypatch.setattr(calibration, "SECONDS", 4 * len(calibration.PACKS))
    folder = tmp_path / "calibration"
    monkeypatch.setattr(sys, "argv", ["calibration.py", str(folder), "--work-dir", str(tmp_path)])
    calibration.main()
    found = read_manifest(folder / "calibration.tsv")
    assert [item.transcript for item in found] == ["NUMBER 0", "NUMBER 3", "NUMBER 6", "NUMBER 9"] * len(
        calibration.PACKS
    )
    samples, rate = soundfile.read(found[1].path, dtype="int16")
    assert (rate, len(samples), set(samples)) == (16_000, 16_000, {300})


def test_a_calibrated_bundle_has_a_column_of_its_own():
    results = json.loads((RECIPE / "results" / "quantization.json").read_text(encoding="utf-8"))
    rows = tables.quantization_table(results, {"int4-experts": results, "calibrated": results}).splitlines()
    assert rows[0] == "| demo model | float32 | int8 | int4-experts | calibrated |"
    assert {row.count("|") for row in rows} == {6}
