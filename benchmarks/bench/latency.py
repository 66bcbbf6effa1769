"""How long does a user of a live source wait for chunks, the first partial result, words and the final result?

docs/bench.md explains the algorithmic and the compute part of each wait. Word times come from the final result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from u2moe.benchmarks.bench.speed import latencies
from u2moe.benchmarks.bench.terminal import WAITS
from u2moe.benchmarks.instruments.probe import Event, Mode, Observation, Probe, Samples
from u2moe.benchmarks.instruments.statistics import percentiles, show_progress
from u2moe.runtime import Result
from u2moe.runtime.text.vocabulary import Vocabulary

Wait = tuple[float, float]  # seconds of the algorithmic part and of the compute part


def measure_latency(probes: Mapping[str, Probe], recordings: Sequence[Samples], mode: Mode) -> list[dict[str, Any]]:
    """Recognise recordings in real time with each bundle in turn. Return one entry per bundle; see `summary`."""
    observed: dict[str, list[Observation]] = {name: [] for name in probes}
    # Warm up with the first recording at full speed.
    for probe in probes.values():
        probe.recognise(recordings[0], mode)
    for number, samples in enumerate(recordings, start=1):
        show_progress(f"paced, {mode.name}, recording {number} of {len(recordings)}")
        for name, probe in probes.items():
            observed[name].append(probe.recognise(samples, mode, paced=True))
    entries: list[dict[str, Any]] = []
    for name, probe in probes.items():
        found = summary(observed[name], probe.recognizer.vocabulary, probe.chunk_s(mode) or 0.0)
        rules = probe.options.endpoint
        silence = rules.rule2.min_trailing_silence if rules and rules.rule2 else None
        entries.append({"bundle": name, "mode": mode.name, "paced": True, **found, "endpoint_silence_s": silence})
    return entries


def summary(observed: Sequence[Observation], vocabulary: Vocabulary, chunk_s: float) -> dict[str, Any]:
    """Return latencies over all observed utterances; docs/bench.md explains them. Without speech, waits are missing."""
    result: dict[str, Any] = {}
    if chunks := [event.compute_s for item in observed for event in item.events]:
        result |= {"chunk_latency_s": latencies([chunks], chunk_s), "chunk_budget_s": chunk_s}
    waits: dict[str, list[Wait]] = {name: [] for name in WAITS}
    shown = changed = revised = 0
    for item in observed:
        end = Event(audio_s=item.audio_s, compute_s=item.final_s, tokens=(), segment=-1)
        for segment in item.segments:
            events = [event for event in item.events if event.segment == segment.segment]
            final = next((event for event in item.events if event.segment > segment.segment), end)
            words = emissions(segment, events, final, vocabulary)
            last = [(final.audio_s - word.end, final.compute_s) for word in segment.words[-1:]]
            committed = commitments(segment, events, final)
            found_by_name = (first_partial(segment, events, final), words, words[:1], words[-1:], committed, last)
            for name, found in zip(WAITS, found_by_name, strict=True):
                waits[name] += found
            revised += segment.revised
            num_shown, num_changed = flicker(segment, events, vocabulary)
            shown, changed = shown + num_shown, changed + num_changed
    for name, found in waits.items():
        if found:
            algorithmic, compute = zip(*found, strict=True)
            parts = {"algorithmic": algorithmic, "compute": compute, "total": [sum(wait) for wait in found]}
            result[name] = {part: percentiles(seconds) for part, seconds in parts.items()}
    if shown:
        result |= {"flicker": changed / shown, "revised": revised / max(len(waits["word_s"]), 1)}
    return result


def flicker(segment: Result, events: Sequence[Event], vocabulary: Vocabulary) -> tuple[int, int]:
    """Return the number of words in the longest partial result, and at how many positions words changed or vanished."""
    hypotheses = [*(event.tokens for event in events), segment.tokens]
    texts = [[word.text for word in vocabulary.words(tokens)] for tokens in hypotheses]
    num_shown = max((len(words) for words in texts[:-1]), default=0)
    changed = 0
    for position in range(num_shown):
        seen = [words[position] if position < len(words) else None for words in texts]
        first = next(number for number, text in enumerate(seen) if text is not None)
        changed += any(text != seen[first] for text in seen[first:])
    return num_shown, changed


def first_partial(segment: Result, events: Sequence[Event], final: Event) -> list[Wait]:
    """Return the wait for an utterance's first tokens; [] if it has no words. The event `final` ended the utterance."""
    if not segment.words:
        return []
    shown = next((event for event in events if event.tokens), final)
    return [(shown.audio_s - segment.words[0].start, shown.compute_s)]


def emissions(segment: Result, events: Sequence[Event], final: Event, vocabulary: Vocabulary) -> list[Wait]:
    """Return, for each word of an utterance, the wait until this word and all earlier words no longer change."""
    waits = []
    for word, result in zip(vocabulary.words(segment.tokens), segment.words, strict=True):
        settled = final
        for event in reversed(events):
            if list(event.tokens[: word.end]) != segment.tokens[: word.end]:
                break
            settled = event
        waits.append((settled.audio_s - result.end, settled.compute_s))
    return waits


def commitments(segment: Result, events: Sequence[Event], final: Event) -> list[Wait]:
    """Return, for each word of an utterance, the wait until it is committed. Empty if any word was revised."""
    waits = []
    for number, word in enumerate([] if segment.revised else segment.words):
        event = next((event for event in events if event.num_committed > number), final)
        waits.append((event.audio_s - word.end, event.compute_s))
    return waits
