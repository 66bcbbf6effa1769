"""Measurement and summary of times: spreads, stages, chunks and the waits of a user."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
from manifests import with_decoding

from u2moe.benchmarks.bench import latency, speed
from u2moe.benchmarks.instruments.host import EnergyMeter
from u2moe.benchmarks.instruments.probe import STAGES, Event, Mode, Observation, Probe
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, percentiles
from u2moe.runtime import Bundle, Recognizer, Result, WordResult
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

CHUNKS = Mode(chunk_size=4, num_left_chunks=4)


def observed(*, wall_s=1.0, events=(), segments=(), final_s=0.5, audio_s=10.0, text=""):
    stages = dict.fromkeys(STAGES, 0.0) | {"encoder": 0.75 * wall_s, "search": 0.25 * wall_s}
    return Observation(
        audio_s=audio_s, wall_s=wall_s, cpu_s=2 * wall_s, stages=stages, events=list(events), final_s=final_s,
        segments=list(segments) or [Result(text=text, is_final=True)],
    )  # fmt: skip


def event(audio_s, compute_s, tokens=(), segment=0, num_committed=0):
    return Event(
        audio_s=audio_s, compute_s=compute_s, tokens=tuple(tokens), segment=segment, num_committed=num_committed
    )


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
    results = [observed(text="a b c"), observed(text="d"), observed(text="e f")]
    assert speed.word_errors(results, ["A X C", "", "E F"]) == {
        "num_words": 5, "rate": 0.2, "errors": [1, 0], "lengths": [3, 2],
    }  # fmt: skip


def test_energy_is_that_of_all_packages(tmp_path):
    """Write counters of two packages, one of them wrapping around; the others count the same energy twice."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9000000\n")
        (tmp_path / zone / "energy_uj").write_text("8000000\n")
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("8500000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000\n")
    assert meter.joules() == 2.5
    assert meter.joules() == 0
    assert not meter.missing


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "PLACE has no processor energy counter (RAPL)"),
        ({"name": "core"}, "PLACE has no processor energy counter (RAPL)"),
        ({"name": "package-0", "max_energy_range_uj": "9"},
         "PLACE/intel-rapl:0/energy_uj cannot be read: most systems require root"),
        ({"name": "package-0", "energy_uj": "1"},
         "PLACE/intel-rapl:0/max_energy_range_uj cannot be read: most systems require root"),
    ],
)  # fmt: skip
def test_energy_that_is_not_counted_is_missing_for_a_reason(tmp_path, content, reason):
    (tmp_path / "intel-rapl:0").mkdir()
    for name, text in content.items():
        (tmp_path / "intel-rapl:0" / name).write_text(text)
    meter = EnergyMeter(tmp_path)
    assert (meter.joules(), meter.missing) == (None, reason.replace("PLACE", str(tmp_path)))


def test_energy_of_an_hour_is_reported_where_it_is_counted(probe, sound, monkeypatch):
    used = iter([1.0, 5.0, 1.0, 8.0])
    monkeypatch.setattr(speed, "EnergyMeter", lambda: SimpleNamespace(joules=lambda: next(used), missing=""))
    modes = {"one": [Mode()]}
    (entry,) = speed.measure_speed({"one": probe}, [sound[:16_000]], modes, repetitions=1)
    assert (entry["energy_wh_per_hour"]["median"], entry["energy_missing"]) == (8.0, None)
    num_words = sum(len(segment.words) for segment in probe.recognise(sound[:16_000], Mode()).segments)
    assert entry["words_per_joule"]["median"] == num_words / 8 > 0
    monkeypatch.setattr(speed, "EnergyMeter", lambda: SimpleNamespace(joules=lambda: None, missing="no counter"))
    (entry,) = speed.measure_speed({"one": probe}, [sound[:16_000]], modes, repetitions=1)
    assert (
        entry["energy_wh_per_hour"], entry["words_per_joule"], entry["energy_missing"],
    ) == (None, None, "no counter")  # fmt: skip


@pytest.fixture
def vocabulary():
    return Vocabulary(["<blank>", "\u2581a", "b", "\u2581c", "\u2581d"], TextConfig(tokenizer="bpe"))


def utterance(tokens, spans, segment=0):
    words = [WordResult(word="w", start=start, end=end, confidence=None) for start, end in spans]
    return Result(text="w", is_final=True, segment=segment, tokens=tokens, words=words)


def test_a_word_is_there_or_committed_when_it_and_all_before_it_stay(vocabulary):
    events = [event(1.0, 0.1, [1]), event(2.0, 0.2, [1, 2, 3]), event(3.0, 0.3, [1, 3]), event(4.0, 0.4, [1, 2, 4])]
    final = event(5.0, 0.5)
    segment = utterance([1, 2, 3], [(0.25, 0.5), (1.0, 1.5)])
    assert latency.first_partial(segment, events, final) == [(0.75, 0.1)]
    # "ab" disappeared once and is final from the fourth event on; "c" became "d" at the end
    assert latency.emissions(segment, events, final, vocabulary) == [(3.5, 0.4), (3.5, 0.5)]
    assert latency.flicker(segment, events, vocabulary) == (2, 2)
    assert latency.flicker(segment, [event(1.0, 0.1, [1, 2, 3])], vocabulary) == (2, 0)
    assert latency.first_partial(utterance([], []), events, final) == []
    assert latency.first_partial(segment, [event(1.0, 0.1)], final) == [(4.75, 0.5)]
    events = [event(1.0, 0.1, [1], num_committed=0), event(2.0, 0.2, [1, 3], num_committed=1)]
    segment = utterance([1, 3], [(0.25, 0.5), (1.0, 1.5)])
    assert latency.commitments(segment, events, event(5.0, 0.5)) == [(1.5, 0.2), (3.5, 0.5)]
    revised = dataclasses.replace(segment, revised=1)
    assert latency.commitments(revised, events, event(5.0, 0.5)) == []
    found = latency.summary([observed(events=events, segments=[segment, revised])], vocabulary, chunk_s=0.25)
    assert found["revised"] == 1 / 4


def test_waits_end_with_their_utterance(vocabulary):
    first, second = utterance([1, 3], [(0.25, 0.5), (0.5, 1.0)]), utterance([4], [(6.0, 6.5)], segment=1)
    events = [event(1.0, 0.1, [1]), event(2.0, 0.2, [], segment=1), event(7.0, 0.3, [4], segment=1)]
    found = latency.summary([observed(events=events, segments=[first, second], audio_s=8.0)], vocabulary, chunk_s=0.25)
    assert found["first_partial_s"]["algorithmic"] == percentiles([0.75, 1.0])
    assert found["word_s"]["compute"]["max"] == 0.3
    # words of the first utterance, shown with its first chunk and its end; word of the second
    assert found["first_word_s"]["algorithmic"] == percentiles([0.5, 0.5])
    assert found["last_word_s"]["algorithmic"] == percentiles([1.0, 0.5])
    # an endpoint ended the first 1 s after its last word, the end of audio the second after 1.5 s
    assert found["finalisation_s"]["algorithmic"] == percentiles([1.0, 1.5])
    assert found["finalisation_s"]["compute"] == percentiles([0.2, 0.5])
    assert found["finalisation_s"]["total"] == percentiles([1.2, 2.0])
    assert found["chunk_latency_s"]["late"] == pytest.approx(1 / 3)
    assert found["chunk_budget_s"] == 0.25

    # without speech, no wait is reported
    found = latency.summary([observed(events=[event(1.0, 0.1)], segments=[utterance([], [])])], vocabulary, chunk_s=1.0)
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
    found = probe.recognise(sound, CHUNKS)
    chunk_s = probe.chunk_s(CHUNKS)
    assert chunk_s == pytest.approx(0.16)
    assert 0 < found.final_s < found.wall_s
    assert len(found.events) == int(4.0 / chunk_s) - 1  # the end of the input flushes the last
    assert np.diff([item.audio_s for item in found.events]).max() <= chunk_s + 0.1
    shown = [len(item.tokens) for item in found.events]
    assert shown == sorted(shown)
    assert 0 < shown[0] < shown[-1]


def test_a_live_source_does_not_wait_for_work_that_is_late(probe, sound, monkeypatch):
    decode = probe.recognizer.decode_streams

    def slow(streams):
        time.sleep(0.15)
        decode(streams)

    monkeypatch.setattr(probe.recognizer, "decode_streams", slow)
    begin = time.perf_counter()
    found = probe.recognise(sound[:8000], CHUNKS, paced=True)
    assert time.perf_counter() - begin >= 0.5
    # buffers of 0.1 s take 0.15 s each: the chunk that the fourth completes waits for work on the first three
    assert found.events[-1].audio_s == 0.4
    assert found.events[-1].compute_s > 0.1 + 4 * 0.15 - 0.4 - 1e-6
    assert found.wall_s >= 6 * 0.15


def test_latency_of_bundles_that_can_stream(probe, sound):
    found = latency.measure_latency({"one": probe}, [sound[:16_000]], CHUNKS)
    assert [entry["bundle"] for entry in found] == ["one"]
    assert found[0]["endpoint_silence_s"] > 0
    assert set(found[0]["word_s"]) == {"algorithmic", "compute", "total"}
