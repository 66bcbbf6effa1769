"""Measurements of `u2moe bench`: spreads, stages, waits of a user, energy, use of experts, and the machine."""

import dataclasses
import math
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
from manifests import with_decoding

from u2moe.benchmarks.bench import latency, speed
from u2moe.benchmarks.bench.expert_usage import measure_experts, summary
from u2moe.benchmarks.instruments import host as machine
from u2moe.benchmarks.instruments.probe import STAGES, Event, Mode, Observation, Probe
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, percentiles
from u2moe.quantize.observed import RoutedLayer
from u2moe.runtime import Bundle, Recognizer, Result, WordResult
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

CHUNKS = Mode(chunk_size=4, num_left_chunks=4)
VOCABULARY = Vocabulary(["<blank>", "\u2581a", "b", "\u2581c", "\u2581d"], TextConfig(tokenizer="bpe"))


def observed(*, wall_s=1.0, events=(), segments=(), audio_s=10.0, text=""):
    stages = dict.fromkeys(STAGES, 0.0) | {"encoder": 0.75 * wall_s, "search": 0.25 * wall_s}
    times = {"audio_s": audio_s, "wall_s": wall_s, "cpu_s": 2 * wall_s, "stages": stages, "final_s": 0.5}
    return Observation(**times, events=list(events), segments=list(segments) or [Result(text=text, is_final=True)])


def event(audio_s, compute_s, tokens=(), segment=0, num_committed=0):
    own = {"tokens": tuple(tokens), "segment": segment, "num_committed": num_committed}
    return Event(audio_s=audio_s, compute_s=compute_s, **own)


def test_spread_and_percentiles_of_cases_that_take_turns(capsys):
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 100.0]).data() == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0, "count": 101}
    calls = []
    cases = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert interleaved(cases, 2, title="letters") == {"a": [3, 5], "b": [4, 6]}
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "- letters: warm-up"
    assert last.startswith("- letters: round 2 of 2, 0 s left")
    assert calls == ["a", "b"] * 3


def test_speed_is_the_median_of_the_rounds():
    chunk = [event(1.0, seconds) for seconds in (0.1, 0.2, 0.6)]
    rounds = [[observed(wall_s=wall_s, events=chunk), observed(wall_s=1.0, events=chunk)] for wall_s in (1.0, 3.0, 2.0)]
    entry = speed.summary(rounds, chunk_s=0.5)
    assert entry["real_time_factor"] == {"median": 0.15, "low": 0.125, "high": 0.175, "count": 3}
    assert entry["core_hours_per_hour"]["median"] == 0.3
    assert entry["shares"] == dict.fromkeys(STAGES, 0.0) | {"encoder": 0.75, "search": 0.25}
    assert entry["stages"]["encoder"]["median"] == pytest.approx(0.75 * 0.15)
    found = entry["chunk_latency_s"]
    assert (found["p50"], found["late"], found["count"]) == (0.2, pytest.approx(1 / 3), 18)
    assert found["rounds"] == {"median": 0.2, "low": 0.2, "high": 0.2, "count": 3}
    assert "chunk_latency_s" not in speed.summary(rounds, chunk_s=None)
    found = speed.word_errors([observed(text=text) for text in ("a b c", "d", "e f")], ["A X C", "", "E F"])
    assert found == {"num_words": 5, "rate": 0.2, "errors": [1, 0], "lengths": [3, 2]}


def test_energy_is_that_of_all_packages_or_missing_for_a_reason(tmp_path):
    """One of two packages' counters wraps around; the others count the same energy twice."""

    def write(folder, **texts):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(f"{text}\n")

    for zone, name in {"0": "package-0", "1": "package-1", "0:0": "core", "2": "psys"}.items():
        write(tmp_path / f"intel-rapl:{zone}", name=name, max_energy_range_uj="9000000", energy_uj="8000000")
    meter = machine.EnergyMeter(tmp_path)
    write(tmp_path / "intel-rapl:0", energy_uj="8500000")
    write(tmp_path / "intel-rapl:1", energy_uj="1000000")
    assert (meter.joules(), meter.joules(), meter.missing) == (2.5, 0, "")
    for texts, reason in (
        ({}, " has no processor energy counter (RAPL)"),
        ({"name": "core"}, " has no processor energy counter (RAPL)"),
        ({"name": "package-0", "max_energy_range_uj": "9"}, "/intel-rapl:0/energy_uj cannot be read"),
        ({"name": "package-0", "energy_uj": "1"}, "/intel-rapl:0/max_energy_range_uj cannot be read"),
    ):
        folder = tmp_path / "-".join(["only", *texts])
        write(folder / "intel-rapl:0", **texts)
        meter = machine.EnergyMeter(folder)
        assert (meter.joules(), meter.missing.partition(": ")[0]) == (None, f"{folder}{reason}")


@pytest.mark.parametrize(("used", "missing"), [((1.0, 5.0, 1.0, 8.0), ""), ((None,) * 4, "no counter")])
def test_energy_of_an_hour_is_reported_where_it_is_counted(probe, sound, monkeypatch, used, missing):
    counted = iter(used)
    monkeypatch.setattr(speed, "EnergyMeter", lambda: SimpleNamespace(joules=lambda: next(counted), missing=missing))
    (entry,) = speed.measure_speed({"one": probe}, [sound[:16_000]], {"one": [Mode()]}, repetitions=1)
    energy, per_joule = (entry[name] and entry[name]["median"] for name in ("energy_wh_per_hour", "words_per_joule"))
    num_words = sum(len(segment.words) for segment in probe.recognise(sound[:16_000], Mode()).segments)
    expected = (None, None, missing) if missing else (8.0, num_words / 8, None)
    assert (energy, per_joule, entry["energy_missing"]) == expected
    assert num_words > 0


def utterance(tokens, spans, segment=0):
    words = [WordResult(word="w", start=start, end=end, confidence=None) for start, end in spans]
    return Result(text="w", is_final=True, segment=segment, tokens=tokens, words=words)


def test_a_word_is_there_or_committed_when_it_and_all_before_it_stay():
    events = [event(1.0, 0.1, [1]), event(2.0, 0.2, [1, 2, 3]), event(3.0, 0.3, [1, 3]), event(4.0, 0.4, [1, 2, 4])]
    final = event(5.0, 0.5)
    segment = utterance([1, 2, 3], [(0.25, 0.5), (1.0, 1.5)])
    assert latency.first_partial(segment, events, final) == [(0.75, 0.1)]
    # "ab" disappeared once and is final from the fourth event on; "c" became "d" at the end
    assert latency.emissions(segment, events, final, VOCABULARY) == [(3.5, 0.4), (3.5, 0.5)]
    assert latency.flicker(segment, events, VOCABULARY) == (2, 2)
    assert latency.flicker(segment, [event(1.0, 0.1, [1, 2, 3])], VOCABULARY) == (2, 0)
    assert latency.first_partial(utterance([], []), events, final) == []
    assert latency.first_partial(segment, [event(1.0, 0.1)], final) == [(4.75, 0.5)]
    events = [event(1.0, 0.1, [1], num_committed=0), event(2.0, 0.2, [1, 3], num_committed=1)]
    segment = utterance([1, 3], [(0.25, 0.5), (1.0, 1.5)])
    assert latency.commitments(segment, events, final) == [(1.5, 0.2), (3.5, 0.5)]
    revised = dataclasses.replace(segment, revised=1)
    assert latency.commitments(revised, events, final) == []
    found = latency.summary([observed(events=events, segments=[segment, revised])], VOCABULARY, chunk_s=0.25)
    assert found["revised"] == 1 / 4


def test_waits_end_with_their_utterance():
    first, second = utterance([1, 3], [(0.25, 0.5), (0.5, 1.0)]), utterance([4], [(6.0, 6.5)], segment=1)
    events = [event(1.0, 0.1, [1]), event(2.0, 0.2, [], segment=1), event(7.0, 0.3, [4], segment=1)]
    found = latency.summary([observed(events=events, segments=[first, second], audio_s=8.0)], VOCABULARY, chunk_s=0.25)
    assert found["first_partial_s"]["algorithmic"] == percentiles([0.75, 1.0])
    assert found["word_s"]["compute"]["max"] == 0.3
    # words of the first utterance, shown with its first chunk and its end; word of the second
    assert found["first_word_s"]["algorithmic"] == percentiles([0.5, 0.5])
    assert found["last_word_s"]["algorithmic"] == percentiles([1.0, 0.5])
    # an endpoint ended the first 1 s after its last word, the end of audio the second after 1.5 s
    waits = {"algorithmic": [1.0, 1.5], "compute": [0.2, 0.5], "total": [1.2, 2.0]}
    assert found["finalisation_s"] == {part: percentiles(seconds) for part, seconds in waits.items()}
    assert (found["chunk_latency_s"]["late"], found["chunk_budget_s"]) == (pytest.approx(1 / 3), 0.25)
    # without speech, no wait is reported
    found = latency.summary([observed(events=[event(1.0, 0.1)], segments=[utterance([], [])])], VOCABULARY, chunk_s=1.0)
    assert set(found) == {"chunk_latency_s", "chunk_budget_s"}


@pytest.fixture(scope="module")
def probe(bundle):
    return Probe(bundle)


def test_hearing_changes_no_result_and_chunks_are_events(probe, recognizer, sound):
    found = probe.recognise(sound, Mode())
    assert found.text == recognizer.transcribe(sound).text
    padded = Bundle(probe.bundle.path, with_decoding(probe.bundle.manifest, padding_s=0.3), probe.bundle.tokens)
    model, own = padded.load(), Probe(padded)
    assert own.model.search_library == model.search_library
    expected, measured = Recognizer(padded, model).transcribe(sound), own.recognise(sound, Mode())
    assert [vars(segment) for segment in measured.segments] == [vars(segment) for segment in expected.segments]
    assert measured.segments != found.segments
    assert found.audio_s == 4.0
    assert sum(found.stages.values()) == pytest.approx(found.wall_s)
    assert min(found.stages.values()) > 0
    found, chunk_s = probe.recognise(sound, CHUNKS), probe.chunk_s(CHUNKS)
    assert chunk_s == pytest.approx(0.16)
    assert 0 < found.final_s < found.wall_s
    assert len(found.events) == int(4.0 / chunk_s) - 1  # the end of the input flushes the last
    assert np.diff([item.audio_s for item in found.events]).max() <= chunk_s + 0.1
    shown = [len(item.tokens) for item in found.events]
    assert shown == sorted(shown)
    assert 0 < shown[0] < shown[-1]


def test_a_live_source_does_not_wait_for_work_that_is_late(probe, sound, monkeypatch):
    decode = probe.recognizer.decode_streams
    monkeypatch.setattr(probe.recognizer, "decode_streams", lambda streams: (time.sleep(0.15), decode(streams)))
    begin = time.perf_counter()
    found = probe.recognise(sound[:8000], CHUNKS, paced=True)
    assert time.perf_counter() - begin >= 0.5
    # buffers of 0.1 s take 0.15 s each: the chunk that the fourth completes waits for work on the first three
    assert found.events[-1].audio_s == 0.4
    assert found.events[-1].compute_s > 0.1 + 4 * 0.15 - 0.4 - 1e-6
    assert found.wall_s >= 6 * 0.15


def layer(name="one", expert_bytes=10):
    return RoutedLayer(name=name, tokens="x", gate=np.eye(4, dtype=np.float32), top_k=2, expert_bytes=expert_bytes)


def test_the_router_takes_the_largest_in_chunks_and_the_whole_alike(bundle, exported, sound):
    tokens = np.array([[[9, 5, 1, 2], [0, 0, 7, 8], [3, 9, 0, 0]]], np.float32)
    np.testing.assert_array_equal(layer().counts(tokens), [2, 2, 1, 1])
    counts = np.array([[[4, 0, 0, 0], [1, 1, 1, 1]], [[2, 2, 0, 0], [1, 1, 1, 1]]])
    found = summary([layer("a"), layer("b", expert_bytes=100)], counts)
    assert found["touched"] == {"mean": 2.75, "layers": {"a": 1.5, "b": 4.0}}
    assert (found["bytes_touched"]["p50"], found["bytes_touched"]["max"], found["bytes"]) == (415.0, 420.0, 440)
    assert found["load"] == {"a": [0.75, 0.25, 0.0, 0.0], "b": [0.25] * 4}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["load_entropy"]["layers"] == {"a": pytest.approx(entropy), "b": pytest.approx(1.0)}
    assert (found["num_chunks"], found["num_experts"], found["experts_per_token"]) == (2, 4, 2)
    assert measure_experts(Bundle.open(exported("dense_tiny")), [sound], [Mode()]) == {}
    found = measure_experts(bundle, [sound, sound[:20_000]], [Mode(), CHUNKS])
    assert list(found) == ["full context", "chunk 4, left 4"]
    whole, chunks = found.values()
    assert whole["num_chunks"] == 2
    assert chunks["num_chunks"] > 30
    assert chunks["touched"]["mean"] < whole["touched"]["mean"]
    # random weights attend locally: a token uses nearly the same experts in any context
    for name, load in whole["load"].items():
        assert sum(load) == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(chunks["load"][name], load, atol=0.15)


X86 = [
    "vendor_id\t: AuthenticAMD", "cpu family\t: 26", "model\t\t: 2", "model name\t: AMD EPYC", "stepping\t: 1",
    "flags\t\t: fpu avx2 avx512_vnni", "", "model name\t: other",
]  # fmt: skip
ARM = ("Features\t: fp asimd i8mm", "CPU implementer\t: 0x41", "CPU part\t: 0xd0b", "", "Model\t\t: Raspberry Pi 5")


def test_processors_are_told_and_caches_of_data_and_what_the_system_does_not_tell(tmp_path, monkeypatch):
    for lines, *expected in (
        (X86, "AMD EPYC", "cpu family 26, model 2, stepping 1", ["avx2", "avx512_vnni"]),
        (ARM, "Raspberry Pi 5, CPU implementer 0x41 CPU part 0xd0b", "", ["asimd", "i8mm"]),
    ):
        (tmp_path / "cpuinfo").write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
        found = machine.describe_machine()
        assert [found[name] for name in ("processor", "processor_version", "instruction_sets")] == expected
    for index, cache in enumerate([("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "Unified", "4096K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), cache, strict=True):
            (folder / name).write_text(f"{value}\n", encoding="utf-8")
    assert machine.caches(tmp_path) == {"L1": 48 * 1024, "L3": 4096 * 1024}
    for name in ("_CPUINFO", "_MEMINFO", "_STATUS", "_CACHES"):
        monkeypatch.setattr(machine, name, tmp_path / "none")
    found = machine.describe_machine()
    assert (found["memory_bytes"], found["caches"], found["instruction_sets"]) == (None, {}, [])
    assert found["processor"]
    assert machine.status_bytes("VmHWM") is None


def test_commit_is_that_of_the_repository_that_holds_the_file(tmp_path, tmp_path_factory, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path_factory.mktemp("package") / "bench" / "a.py"  # as if installed from the clone
    file = tmp_path / package.parent.parent.name / "bench" / "a.py"
    for copy in (file, package):
        copy.parent.mkdir(parents=True)
        copy.write_text("1", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    git("init")
    assert machine.commit(file) is machine.commit(package) is None  # not in the repository's index
    git("add", ".")
    git("commit", "-m", "one")
    name = machine.commit(file)
    assert (len(name), machine.commit(package)) == (12, name)
    file.write_text("2", encoding="utf-8")
    assert (machine.commit(file), machine.commit(package)) == (f"{name}+", None)  # the package's is another version
