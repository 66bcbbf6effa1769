"""`u2moe bench` as a whole: content of a report, and how it is shown, drawn, saved and compared."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from unittest.mock import Mock
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.bench import plan as suite
from u2moe.benchmarks.bench.compare import compare_reports, read_report, time_ratio, values, verdicts
from u2moe.benchmarks.bench.costs import WORK, costs_picture, costs_table, measure_costs
from u2moe.benchmarks.bench.plan import PLANS, Plan, name_bundles, run_suite
from u2moe.benchmarks.bench.terminal import describe
from u2moe.benchmarks.instruments import rates, workload
from u2moe.benchmarks.instruments.probe import Probe
from u2moe.export import convert_static
from u2moe.quantize.inspection import count_parameters
from u2moe.runtime import AudioError, Bundle, DecodingOptions, ProviderError, cli
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.text.word_errors import words
from u2moe.runtime.text.written.formatter import TextFormat

pytestmark = pytest.mark.slow

PLAN = Plan(threads=(1, 2), chunk_sizes=(16,), left_chunks=(4,), repetitions=2, paced_s=0.3)
MODES = ["full context", "chunk 16, left 4"]
BOTH = ("moe_tiny", "dense_tiny")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, sound, recognizer):
    folder = tmp_path_factory.mktemp("recordings")
    for name, part in (("a", sound[:16_000]), ("b", sound[24_000:40_000])):
        soundfile.write(folder / f"{name}.wav", part, 16_000)
    text = recognizer.transcribe(folder / "a.wav").text
    return [Recording(path=folder / "a.wav", transcript=text), Recording(path=folder / "b.wav", transcript="")]


@pytest.fixture(scope="module")
def report(exported, recordings):
    bundles = {name: Bundle.open(exported(name)) for name in BOTH}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_CALL_S", 0.005)  # values do not matter here
        patch.setattr(workload, "UTTERANCE_S", 1.0)
        patch.setitem(workload.NUM_CHUNKS, "streaming-8", 1)
        patch.setattr(suite, "_PROCESSES", 1)
        patch.setenv("U2MOE_KERNELS", "onnxruntime")  # a graph with native kernels is profiled twice
        return run_suite(bundles, recordings, PLAN, options=DecodingOptions(length_penalty=0.5), hotwords=[])


@pytest.fixture
def saved(report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    return file


@pytest.fixture
def bench(capsys):

    def run(*arguments):
        try:
            status = cli.main(["bench", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def gate(bench, exported, monkeypatch):
    """Return a function that checks limits on a report as if it had just been measured."""

    def run(found, limit):
        monkeypatch.setattr("u2moe.benchmarks.bench.cli.run_suite", lambda *_, **__: found)
        status, out, _ = bench(*map(exported, BOTH), limit)
        return status, out.splitlines()

    return run


def test_every_number_of_threads_mode_and_bundle_is_there_with_a_spread(report, recordings, exported):
    cases = [(entry["threads"], entry["mode"], entry["bundle"]) for entry in report["speed"]]
    assert cases == [(n, mode, name) for n in (1, 2) for mode in MODES for name in BOTH]
    assert sorted(cases) == sorted((entry["threads"], entry["mode"], entry["bundle"]) for entry in report["bound"])
    assert [(entry["bundle"], entry["mode"]) for entry in report["latency"]] == [(name, MODES[1]) for name in BOTH]
    assert min(entry["endpoint_silence_s"] for entry in report["latency"]) > 0
    assert [entry["threads"] for entry in report["rates"]] == [1, 2]
    assert {name: list(modes) for name, modes in report["experts"].items()} == {"moe_tiny": MODES}
    assert (report["plan"]["repetitions"], report["bundles"]["moe_tiny"]["recipe"]) == (2, "float32")
    assert report["decoding"] == {"length_penalty": 0.5, "hotwords": []}
    assert report["audio"] == {"files": ["a.wav", "b.wav"], "seconds": 2.0}
    for entry in report["speed"]:
        for value in (entry["real_time_factor"], entry["core_hours_per_hour"], *entry["stages"].values()):
            assert value["count"] == 2
            assert value["low"] <= value["median"] <= value["high"]
        assert sum(entry["shares"].values()) == pytest.approx(1)
        assert min(entry["shares"].values()) > 0
        assert entry["finalisation_s"]["count"] == 4
    assert {entry["whole"]["seconds"]["count"] for entry in report["bound"]} == {2}
    for name, entry in report["footprint"].items():
        assert {entry[key]["count"] for key in ("import_s", "verify_s", "load_s", "first_s")} == {1}
        assert min(entry[key]["median"] for key in ("import_s", "verify_s", "load_s", "first_s")) > 0
        imported, loaded, peak = (entry[f"{key}_bytes"]["median"] for key in ("imported", "loaded", "peak"))
        assert 20e6 < imported < loaded <= peak < 500e6
        files = [file.stat().st_size for file in exported(name).iterdir() if file.suffix != ".json"]
        assert entry["disk"]["files"] == sum(files)
    exact, other = (entry["words"] for entry in report["speed"][:2])
    num_words = len(words(recordings[0].transcript))
    assert exact == {"num_words": num_words, "rate": 0.0, "errors": [0], "lengths": [num_words]}
    assert other["rate"] > 0


def test_tables_show_what_was_measured(report):
    text = describe(report)
    for section in ("Speed end", "Latency at full", "Latency in real", "Fresh process", "Experts used", "Graphs: ms"):
        assert f"\n{section}" in text
    line = next(line for line in text.splitlines() if line.startswith("full context") and "moe_tiny" in line)
    assert f"{report['speed'][0]['real_time_factor']['median']:.4f} (" in line
    assert "\ndecoding: length_penalty 0.5, hotwords []\n" in text
    numbers = report["costs"]["moe_tiny"]["parameters"]
    total, active = (f"{numbers[key] / 1e6:.1f}" for key in ("total", "active"))
    assert f" MB, {total} million parameters ({active} active for a token), kernels: " in text
    wait = report["latency"][0]["finalisation_s"]
    assert f"{wait['algorithmic']['p50'] * 1e3:.0f} + {wait['compute']['p50'] * 1e3:.1f}" in text
    assert "not included in the bound" not in text
    changed = copy.deepcopy(report)
    changed["bound"][0] |= {"not_counted": {"QMoE": 0.25}, "unknown": {"encoder/new/MatMul": 0.1}}
    changed["speed"][0]["energy_wh_per_hour"] = {"median": 2.5, "low": 2.0, "high": 3.0, "count": 2}
    changed["speed"][0]["energy_missing"] = "nobody counts"
    text = describe(changed)
    assert "2.500 (2.000-3.000)" in text
    assert "\nenergy not measured: nobody counts\n" in text
    assert "included in the bound: QMoE (25% of the time)" in text
    assert "products of unknown parts, counted as other: encoder/new/MatMul" in text


def test_costs_of_several_bundles_stand_beside_those_of_the_first(report, exported):
    numbers = {}
    for name, own in report["costs"].items():
        assert list(own["work"]) == list(WORK)
        assert all(spread["count"] == 2 and spread["median"] > 0 for spread in own["work"].values())
        numbers[name] = own["parameters"]
        assert own["parameters"] == count_parameters(Bundle.open(exported(name)))
    assert numbers["dense_tiny"]["active"] == numbers["dense_tiny"]["total"]
    _, head, moe, dense = costs_table(report)
    titles = ["parameters, M", "active, M", "files, MB", "memory, MB"]
    assert all(title in head for title in [*titles, *(f"{title}, RTF" for title in WORK.values())])
    assert (moe.count("(1.00)"), dense.count("(")) == (len(titles) + len(WORK), len(titles) + len(WORK))
    share = numbers["dense_tiny"]["total"] / numbers["moe_tiny"]["total"]
    assert f"{numbers['dense_tiny']['total'] / 1e6:.3g} ({share:.2f})" in dense
    assert {*BOTH, *titles} <= {item.text for item in ET.fromstring(costs_picture(report)).iter()}
    without = copy.deepcopy(report)
    without["costs"]["moe_tiny"] = {"parameters": None, "work": {"full": report["costs"]["moe_tiny"]["work"]["full"]}}
    without["costs"]["dense_tiny"]["work"].pop("second-pass")
    assert "batch" not in costs_table(without)[1]  # the first bundle has no value to compare with
    without["bundles"] = {name: without["bundles"][name] for name in reversed(BOTH)}
    assert " -" in costs_table(without)[-1]


def test_without_the_extra_the_bound_and_experts_are_left_out_and_all_else_is_measured(bundle, recordings, tmp_path):
    (tmp_path / "a.wav").symlink_to(recordings[0].path)
    code = """
import sys
sys.modules |= dict.fromkeys(("onnx_ir", "onnx", "torch", "matplotlib"))
from u2moe.runtime.cli import main
sys.exit(main(["bench", *sys.argv[1:], "--quick", "--repetitions", "1"]))
"""
    command = [sys.executable, "-c", code, bundle.path, "--list", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not measured without onnx-ir: bound, experts, numbers of parameters; to install it: pip" in done.stdout
    assert "real-time factor" in done.stdout
    assert "10^9 multiply-adds" not in done.stdout


def test_a_fixed_shape_is_a_mode_of_its_source_too(exported, report, recordings, tmp_path, monkeypatch, bench):
    source, file, mode = exported("moe_tiny"), tmp_path / "report.json", "chunk 16, left 2"
    static = convert_static(source, tmp_path / "static", num_left_chunks=2).path
    (tmp_path / "list.tsv").write_text(f"{recordings[0].path}\t{recordings[0].transcript}", encoding="utf-8")
    monkeypatch.setattr(rates, "_CALL_S", 0.005)
    monkeypatch.setitem(PLANS, "quick", dataclasses.replace(PLANS["quick"], repetitions=1, paced_s=0.3))
    known = report["footprint"]["moe_tiny"]
    monkeypatch.setattr(suite, "measure_footprint", lambda bundles, *_, **__: dict.fromkeys(bundles, known))
    status, out, _ = bench(static, source, "--quick", "--list", tmp_path / "list.tsv", "-o", file)
    assert status == 0
    report = read_report(file)
    for section, others in (("speed", MODES), ("latency", MODES[1:])):
        expected = {"static": {mode}, source.name: {*others, mode}}
        found = {name: {each["mode"] for each in report[section] if each["bundle"] == name} for name in expected}
        assert found == expected
    assert list(report["costs"]["static"]["work"]) == ["second-pass"]
    counted = ({entry["bundle"] for entry in report["bound"]}, set(report["experts"]))
    assert counted == ({source.name},) * 2
    assert f"\nstatic: {report['fixed_shapes']['static']}\n" in out
    assert len({str(entry["words"]) for entry in report["speed"] if entry["mode"] == mode}) == 1
    assert re.match(f"time static / {source.name} = .*, {mode}, 1 thread\n", out)
    other = json.loads(json.dumps(report).replace(mode, "chunk 9, left 1").replace(MODES[0], "").replace(MODES[1], ""))
    assert time_ratio(report, other)[0].endswith(f", {mode} and chunk 9, left 1, 1 thread")
    with pytest.raises(ValueError, match="in the same mode, but the bundles have no mode in common"):
        list(verdicts({"words": 1.0}, report, other))
    monkeypatch.setattr(workload, "NUM_LEFT_CHUNKS", 2)
    found = measure_costs({"static": Probe(Bundle.open(static))}, [np.zeros(16_000, np.float32)], 1)
    assert list(found["static"]["work"]) == ["streaming", "second-pass"]


def test_a_difference_is_told_from_the_spread_and_a_report_equals_itself(report, saved):
    lines = list(compare_reports(read_report(saved), report))
    assert len(lines) == 1 + len(values(report))
    assert all(re.search(r"(1\.000|-) +(within the spread|too few rounds)$", line) for line in lines[1:])
    assert any(re.search("word errors.* within the spread$", line) for line in lines)  # word errors have no spread
    before, changed = copy.deepcopy(report), copy.deepcopy(report)
    changed["machine"]["onnxruntime"] = "0.1"
    changed["audio"]["seconds"] += 1
    changed["providers"] = ["OtherExecutionProvider"]
    changed["kernels"]["moe_tiny"]["description"] = "others"
    entry = changed["speed"][0]
    before["speed"][0]["real_time_factor"]["count"] = 4
    entry["real_time_factor"] = {name: 2 * value for name, value in entry["real_time_factor"].items()}
    entry["words"]["rate"] = 0.5
    changed["speed"].pop()
    lines = list(compare_reports(before, changed))
    assert lines[:3] == [
        f"onnxruntime: {report['machine']['onnxruntime']} -> 0.1",
        f"providers: {report['providers']} -> ['OtherExecutionProvider']",
        f"kernels of moe_tiny: {report['kernels']['moe_tiny']['description']} -> others",
    ]
    assert lines[3].startswith("the recordings differ")
    assert re.fullmatch(r"real-time factor, moe_tiny, full context, 1 thread .* 2\.000 +more", lines[5])
    assert re.fullmatch(r"word errors, moe_tiny, full context, 1 thread +0\.0000 +0\.5000 +- +more", lines[6])
    assert lines[7].endswith(("within the spread", "too few rounds"))
    assert lines[-1] == "5 measurements are in only one of the reports"
    assert any(re.search(r" 0\.500 +less$", line) for line in compare_reports(changed, before))
    # bundles are compared by position, whatever their names
    lines = list(compare_reports(json.loads(json.dumps(report).replace("moe_tiny", "old")), report))
    assert lines[0] == "old is compared with moe_tiny, at the same position in the other report"
    assert len(lines) == 2 + len(values(report))
    for content in (
        "",
        "[]",
        *(f'{{"format": "u2moe-bench", "version": {rest}}}' for rest in ("0", '1, "machine": {}')),
    ):
        saved.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"report\.json: "):
            read_report(saved)


def test_command_shows_and_compares_what_was_saved(report, saved, tmp_path, bench):
    saved.write_text(json.dumps({**report, "latency": [], "bound": [], "rates": [], "experts": {}}), encoding="utf-8")
    copied = tmp_path / "other" / "copy.json"
    limits = ("--fail-above-words", "0.5", "--fail-above-size", "1")
    status, out, _ = bench(saved, saved, "-o", copied, *limits)
    assert status == 0
    assert out.endswith("\nsize: 1.000, within --fail-above-size 1\npassed: all limits met\n")
    assert out.startswith("time moe_tiny / moe_tiny = 1.000 (quartiles, not measured in turns: ")
    for text in ("Speed end to end", "\n".join(costs_table(report)), f"Against {saved}"):
        assert text in out
    assert (copied.parent / "copy.svg").is_file()
    assert read_report(copied) == read_report(saved)


def test_command_measures_what_it_is_told_to(exported, recordings, tmp_path, monkeypatch, bench):
    seen = {}

    def record(bundles, recordings, plan, **chosen):
        seen.update(bundles=bundles, recordings=recordings, plan=plan, **chosen)
        raise ProviderError("enough")

    monkeypatch.setattr("u2moe.benchmarks.bench.cli.run_suite", record)
    (tmp_path / "one.wav").symlink_to(recordings[0].path)
    given = "--num-threads 2,1,2 --chunk-sizes 8 --repetitions 7 --providers CPUExecutionProvider --beam-size 3"
    given += " --search ctc_prefix_beam --ctc-weight 0.4 --reverse-weight 0.1 --length-penalty 0.2"
    given += " --hotwords none --lm none --format-text --list"
    assert bench(exported("moe_tiny"), *given.split(), tmp_path) == (2, "", "u2moe: error: enough\n")
    assert seen["plan"] == Plan(threads=(2, 1), chunk_sizes=(8,), repetitions=7)
    assert seen["settings"] == SessionSettings(providers=["CPUExecutionProvider"])
    weights = {"ctc_weight": 0.4, "reverse_weight": 0.1, "length_penalty": 0.2}
    others = {"search": "ctc_prefix_beam", "beam_size": 3, "language_model": "none", "text_format": TextFormat()}
    assert (seen["options"], seen["hotwords"]) == (DecodingOptions(**weights, **others), ())
    assert seen["recordings"] == [Recording(path=tmp_path / "one.wav", transcript="")]
    assert [bundle.path for bundle in seen["bundles"].values()] == [exported("moe_tiny")]
    assert bench("--quick")[0] == 2
    assert (seen["plan"], seen["options"], seen["hotwords"]) == (PLANS["quick"], DecodingOptions(), None)
    assert [recording.transcript for recording in seen["recordings"]]


@pytest.mark.parametrize(("arguments", "message"), [
    ("--num-threads one", "--num-threads must be numbers separated by commas, got 'one'"),
    ("--num-threads 0", "numbers of threads must be at least 1, got [0]"),
    ("--chunk-sizes 0", "chunk sizes must be at least 1"),
    ("--repetitions 0", "repetitions must be at least 1, got 0"),
    ("demo no.json", "no.json: cannot be read as a report"),
    ("a.json b.json c.json", "at most two reports"),
    ("--fail-above 1", "--fail-above needs two bundles or reports"),
    ("-o /dev/null/a/now.json", "Not a directory: '/dev/null/a'"),
    ("--list no.tsv", "no.tsv: cannot be read as a list of recordings"),
    ("demo demo --fail-above 1 --quick --repetitions 3", "repetitions must be at least 4 for"),
    ("demo demo --fail-above-words 1 --list CLIPS", "--fail-above-words needs recordings with tr"),
    *((f"--fail-above={value}", f"--fail-above: must be a number of at least 0, got '{value}'")
      for value in ("nan", "-1", "inf", "fast")),
])  # fmt: skip
def test_what_cannot_be_done_is_said_before_measuring(arguments, message, monkeypatch, recordings, tmp_path, bench):
    (tmp_path / "one.wav").symlink_to(recordings[0].path)
    monkeypatch.setattr(suite, "measure_speed", None)
    status, _, error = bench(*arguments.replace("CLIPS", str(tmp_path)).split())
    assert status == 2
    assert message in error


def test_what_cannot_be_measured_is_named_by_the_end_of_its_path(bundle, recordings, tmp_path):
    with pytest.raises(ProviderError, match="NoProvider is not installed"):
        run_suite({"moe": bundle}, recordings, PLAN, settings=SessionSettings(providers=["NoProvider"]))
    soundfile.write(tmp_path / "short.wav", np.zeros(800), 16_000)
    with pytest.raises(AudioError, match=r"short\.wav: has 3 feature frames, expected at least 7"):
        run_suite({"moe": bundle}, [Recording(path=tmp_path / "short.wav", transcript="")], PLAN)
    names = name_bundles([tmp_path / "a" / "int8", tmp_path / "b" / "int8"])
    assert names == {"a/int8": tmp_path / "a" / "int8", "b/int8": tmp_path / "b" / "int8"}
    assert list(name_bundles([tmp_path / "x", tmp_path / "y"])) == ["x", "y"]
    assert list(name_bundles([tmp_path / "x", tmp_path / "y" / ".." / "x"])) == ["x", "x (2)"]


@pytest.mark.parametrize(("factors", "interval", "verdict"), [
    ((1.0,) * 4, "1.000 (95 %: 1.000 to 1.000)", None),
    ((1.04,) * 4, "1.040 (95 %: 1.040 to 1.040)", None),
    ((1.2,) * 4, "1.200 (95 %: 1.200 to 1.200)", "more than"),
    ((1.5, 0.5, 4 / 3, 1.125), "1.100 (95 %: 0.750 to 1.375)", "not significantly more than"),  # by chance
])  # fmt: skip
def test_the_ratio_of_two_that_took_turns_is_a_gate(report, gate, factors, interval, verdict):
    changed = copy.deepcopy(report)
    for entry in changed["speed"]:
        entry["real_time_factor"]["count"] = 4
    ours, theirs = changed["speed"][:2]
    theirs["seconds"] = [1.0, 2.0, 3.0, 4.0]
    ours["seconds"] = [factor * seconds for factor, seconds in zip(factors, theirs["seconds"], strict=True)]
    status, (first, second, *_, limit, last) = gate(changed, "--fail-above=1.05")
    assert first == f"time moe_tiny / dense_tiny = {interval}, full context, 1 thread"
    assert second.startswith("Costs, and ratios to the first bundle")
    assert limit == f"time: {interval}, {verdict or 'within'} --fail-above 1.05"
    assert (status, last) == ((1, f"failed: {limit}") if verdict == "more than" else (0, "passed: all limits met"))


@pytest.mark.parametrize(("limit", "change", "fails"), [
    ("--fail-above-words=0.5", {"errors": [1] * 40}, True),
    ("--fail-above-words=0.5", {"errors": [0] * 37 + [1] * 3}, False),  # three of 400 words, by chance
    ("--fail-above-words=15", {"errors": [1] * 40}, False),
    ("--fail-above-words=0.5", {}, False),
    ("--fail-above-size=1.5", {"files": 2}, True),
    ("--fail-above-size=2", {"files": 2}, False),
    ("--fail-above-memory=1.5", {"peak_bytes": 2.0}, True),
    ("--fail-above-memory=1.05", {"peak_bytes": 1.1}, False),  # within the spread
])  # fmt: skip
def test_words_size_and_memory_are_gates(report, limit, change, fails, gate):
    changed = copy.deepcopy(report)
    for entry in changed["speed"]:
        entry["words"] = {"errors": [0] * 40, "lengths": [10] * 40, "num_words": 400, "rate": 0}
    ours, theirs = changed["footprint"].values()
    for entry, ratio in ((ours, change.get("peak_bytes", 1.0)), (theirs, 1.0)):
        entry["disk"]["files"] = 1000
        entry["peak_bytes"] = {"median": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "count": 5}
    ours["disk"]["files"] *= change.get("files", 1)
    changed["speed"][0]["words"] |= {key: value for key, value in change.items() if key == "errors"}
    status, (*_, last) = gate(changed, limit)
    assert status == fails
    assert last.startswith(f"failed: {limit[13:].partition('=')[0]}"[:12] if fails else "passed")
    assert not fails or limit.replace("=", " ") in last
    assert ("(quartiles: " in last) == (fails and "memory" in limit)


@pytest.mark.parametrize(("limit", "message"), [
    ("--fail-above-words=1", "a report has no word errors per recording: measure again with transcripts"),
    ("--fail-above=1", "moe_tiny: measured in 2 rounds; a limit needs at least 4"),
    ("--fail-above=crash", "RuntimeError: broken"),
])  # fmt: skip
def test_what_a_gate_cannot_judge_is_an_error(report, saved, limit, message, bench, monkeypatch):
    changed = copy.deepcopy(report)
    del changed["speed"][0]["words"]["errors"]
    saved.write_text(json.dumps(changed), encoding="utf-8")
    if "crash" in limit:
        monkeypatch.setattr("u2moe.benchmarks.bench.cli.describe", Mock(side_effect=RuntimeError("broken")))
    status, _, error = bench(saved, saved, limit.replace("crash", "1"))
    assert status == 2
    assert message in error
