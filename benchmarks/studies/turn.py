"""How soon does the language model (`EndpointConfig.turn`) end utterances, and how often in the middle of a sentence?

    python -m u2moe.benchmarks.studies.turn BUNDLE TEST.tsv ...

Each sentence receives a pause after a random word, and silence after its end. The encoder runs once, in chunks. Each
rule is then applied to a search over its output. Delays are in seconds of audio, the same on every machine.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import recognition_parser, script
from u2moe.runtime import EndpointConfig, EndpointRule, Fusion, Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.decoding.native_search import new_search
from u2moe.runtime.decoding.utterance import Endpointer, Frames, Utterance
from u2moe.runtime.model.features import fbank

RATE = 16_000
SHORTEST = 4  # minimum number of words in a sentence
PAUSES_S, SILENCE_S = (0.3, 2.0), 3.0
_NOISE = 1e-4  # Standard deviation of the noise in pauses. Microphones do not record digital silence.
SILENCES, TURNS = (0.6, 0.9, 1.2), (0.02, 0.05, 0.07, 0.1)  # seconds for rule 2; `turn` with the default rule 2


def rules() -> dict[str, EndpointConfig]:
    """Return the configurations to compare, by name."""
    found = {f"turn={each:g}": EndpointConfig(turn=each) for each in TURNS}
    silences = {each: EndpointRule(must_contain_nonsilence=True, min_trailing_silence=each) for each in SILENCES}
    return {f"silence of {each:g} s": EndpointConfig(rule2=rule) for each, rule in silences.items()} | found


def with_pause(
    recognizer: Recognizer, recording: Recording, random: np.random.Generator
) -> tuple[npt.NDArray[np.float32], float] | None:
    """Return a sentence with a pause and silence at its end, and its last word's end; None if it is too short."""
    samples = read_audio(recording.path, RATE)
    words = [word for segment in recognizer.align(samples, recording.transcript).segments for word in segment.words]
    if len(words) < SHORTEST:
        return None
    place, pause_s = int(random.integers(1, len(words) - 1)), random.uniform(*PAUSES_S)
    cut = round((words[place].end + words[place + 1].start) / 2 * RATE)
    end = round(words[-1].end * RATE)
    silences = [np.zeros(round(seconds * RATE), np.float32) for seconds in (pause_s, SILENCE_S)]
    whole = np.concatenate([samples[:cut], silences[0], samples[cut:end], silences[1]])
    return whole + _NOISE * random.standard_normal(len(whole)).astype(np.float32), end / RATE + len(silences[0]) / RATE


def endpoints(
    recognizer: Recognizer, log_probs: npt.NDArray[np.float32], config: EndpointConfig, fusion: Fusion
) -> list[float]:
    """Return the times in seconds at which utterances end, in a stream with log-probabilities [time, vocab]."""
    model, beam_size = recognizer.model, recognizer.bundle.manifest.decoding.beam_size
    search = partial(new_search, model.search_library, beam_size, model.config.blank, None, fusion)
    found, start = list[float](), 0
    while True:
        rest = Frames(output=np.zeros((len(log_probs) - start, 1), np.float32), log_probs=log_probs[start:])
        utterance = Utterance(0, start, search, rest[:0], keeps_output=False, commits=False)
        utterance.advance(rest, Endpointer(config, model.manifest.frame_s, model.config.blank, fusion))
        if utterance.endpoint is None:
            return found
        start = utterance.end
        found.append(start * model.manifest.frame_s)


def measure(recognizer: Recognizer, recordings: Sequence[Recording], fusion: Fusion, seed: int = 0) -> dict[str, Any]:
    """Return, by rule, percentiles of the delay from sentence end to endpoint, and how many sentences are cut early."""
    random = np.random.default_rng(seed)
    delays: dict[str, list[float]] = {name: [] for name in rules()}
    num_cut = dict.fromkeys(delays, 0)
    for recording in recordings:
        if (made := with_pause(recognizer, recording, random)) is None:
            continue
        samples, end = made
        features = fbank(samples, recognizer.bundle.manifest.features)
        log_probs = recognizer.model.ctc(recognizer.model.encode(features, chunk_size=16, num_left_chunks=4))
        for name, config in rules().items():
            found = endpoints(recognizer, log_probs, config, fusion)
            num_cut[name] += any(each < end for each in found)
            delays[name] += [each - end for each in found if each >= end][:1]
    result = {}
    for name, own in delays.items():
        percentiles = {f"p{share}": round(float(np.percentile(own, share)), 2) for share in (50, 90)}
        result[name] = {"num_cut": num_cut[name], "num_sentences": len(own), **percentiles}
    return result


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table with a row for each set and rule, and separate numbers for some rules."""
    header, rows = ("set", "rule", "delay: median, 90 %", "cut in sentence"), []
    for name, of_rules in results["sets"].items():
        for rule, own in of_rules.items():
            cut = f"{own['num_cut']} of {own['num_sentences']}"
            rows.append((name, rule, f"{own['p50']:.2f}, {own['p90']:.2f} s", cut))
    numbers: dict[str, str] = {}
    for key, rule in (("short", "silence of 0.6 s"), ("rule2", "silence of 1.2 s"), ("turn", "turn=0.1")):
        found = [own[rule] for own in results["sets"].values()]
        cut, num = (sum(each[name] for each in found) for name in ("num_cut", "num_sentences"))
        numbers |= {f"{key}_cut": f"{cut / num:.0%}", f"{key}_delay": f"{found[0]['p50']:.2f}"}
    return {"table": table(header, rows), **numbers}


@script
def main(argv: Sequence[str] | None = None) -> None:
    parser = recognition_parser("turn", __doc__)
    parser.add_argument("--most", type=int, help="maximum number of recordings per list (default: all)")
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle)
    if recognizer.language_model is None:
        raise ValueError(f"{args.bundle}: has no language model, which `turn` needs")
    fusion = Fusion(recognizer.language_model, recognizer.vocabulary)
    sets = {path.stem: measure(recognizer, read_recordings(path)[: args.most], fusion) for path in args.lists}
    publish(args.results, {"sets": sets}, values, bundle=args.bundle)
