"""What does the runtime add to its graphs? Features, search and state of streams, beside what the encoder takes.

    python -m u2moe.benchmarks.overhead BUNDLE... [--repetitions N] [--json FILE]

Streams hear the bundled clips. What a search costs depends on what it is given, and random weights give nothing like
speech: so every bundle is measured with the posteriors that the demo model gives for these clips too, stretched to its
frames and widened to its vocabulary, and with those of them alone in which blank dominates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.listening import STAGES, Heard, Instrument, Mode, Samples, TimedSession
from u2moe.benchmarks.machine import describe_machine
from u2moe.benchmarks.measurement import Spread, interleaved
from u2moe.benchmarks.utterances import CHUNK_SIZE, NUM_LEFT_CHUNKS, NUM_STREAMS, clips
from u2moe.runtime import Bundle, Model, Recognizer
from u2moe.runtime.audio import read_audio
from u2moe.runtime.features import Fbank
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.session import SessionSettings

LogProbs = npt.NDArray[np.float32]

OWN_STAGES = ("features", "search", "other")
"""Stages that are our own code; "other" is the state of streams, joining batches and partial results."""
POSTERIORS = ("speech", "blank", "own")
"""Of the demo model for the clips; those of them with blank above `BLANK`; of the bundle itself."""
BLANK = 0.9
LIMIT = 0.05
"""Share of the encoder's time that our own code may take with one stream of a model of 225 M parameters."""


class SpokenSession(TimedSession):
    """A CTC head that runs, and answers with given posteriors, in turn."""

    posteriors: LogProbs
    """[time, vocab], repeated as often as needed."""
    position = 0

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Log-probabilities by name."""
        super().run(feeds)
        num = next(iter(feeds.values())).shape[1]
        rows = np.arange(self.position, self.position + num) % len(self.posteriors)
        self.position += num
        return {self.graph.outputs[0].name: self.posteriors[rows][np.newaxis]}


def measure_overhead(
    bundles: Mapping[str, Bundle], repetitions: int = 5, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Time by stage of streams with bounded left context, one at a time and several in a batch; all cases in turn.

    Args:
        bundles: by name.
        repetitions: how often each case is measured.
        progress: called with a line for each round.

    Returns:
        One entry for each bundle, posteriors and number of streams; see `entry`.
    """
    demo = Bundle.open(DEMO_FOLDER)
    cases: dict[tuple[str, str, int], Callable[[], Heard]] = {}
    num_chunks = {}
    for (name, bundle), kind in product(bundles.items(), POSTERIORS):
        config, features = bundle.manifest.model, bundle.manifest.features
        samples = np.concatenate([read_audio(file, features.sample_rate) for file in clips()])
        frame_s = config.subsampling_rate * features.frame_shift_ms / 1000
        spoken = widened(demo_posteriors(demo, frame_s), config.vocab_size, config.blank)
        given = {"speech": spoken, "blank": spoken[np.exp(spoken[:, config.blank]) > BLANK], "own": None}[kind]
        listener = instrument(bundle, given)
        for num_streams, heard in ((1, samples), (NUM_STREAMS, samples[: len(samples) // 2])):
            cases[name, kind, num_streams] = case(listener, heard, num_streams)
            num_chunks[name, num_streams] = num_streams * len(heard) / features.sample_rate / (CHUNK_SIZE * frame_s)
    rounds = interleaved(cases, repetitions, title="overhead", progress=progress)
    return [
        {"bundle": name, "posteriors": kind, "num_streams": num, **entry(heard, num_chunks[name, num])}
        for (name, kind, num), heard in rounds.items()
    ]


def instrument(bundle: Bundle, posteriors: LogProbs | None) -> Instrument:
    """A bundle without its second pass, that hears what `posteriors` [time, vocab] say; None: what it hears itself."""
    listener = Instrument(bundle, search="ctc_prefix_beam")
    graph = next(graph for graph in bundle.manifest.model.graphs() if graph.name == "ctc")
    if posteriors is not None:
        where = (bundle.path / graph.file, graph, bundle.manifest, SessionSettings())
        head = SpokenSession("ctc", listener.watch, *where)
        head.posteriors = posteriors
        listener.model = Model(bundle.manifest, listener.model.encoder.session, head, None)
        listener.recognizer = Recognizer(bundle, listener.model, listener.options)
    return listener


def case(listener: Instrument, samples: Samples, num_streams: int) -> Callable[[], Heard]:
    """A function that hears samples with so many streams."""
    mode = Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS, num_streams=num_streams)
    return lambda: listener.hear(samples, mode)


def entry(rounds: Sequence[Heard], num_chunks: float) -> dict[str, Any]:
    """What the rounds of one case gave.

    Args:
        rounds: of the case.
        num_chunks: chunks of all streams in each.

    Returns:
        chunk_s: spread of the seconds per chunk and stream, by stage; shares: of the encoder's time, by stage of our
        own code and "own", all of it.
    """
    shares = [{stage: heard.stages[stage] / heard.stages["encoder"] for stage in OWN_STAGES} for heard in rounds]
    return {
        "chunk_s": {
            stage: Spread.of([heard.stages[stage] / num_chunks for heard in rounds]).data()
            for stage in STAGES
            if stage != "rescoring"
        },
        "shares": {
            **{stage: Spread.of([share[stage] for share in shares]).data() for stage in OWN_STAGES},
            "own": Spread.of([sum(share.values()) for share in shares]).data(),
        },
    }


def demo_posteriors(demo: Bundle, frame_s: float) -> LogProbs:
    """Log-probabilities [time, vocab] of the demo model for the clips, stretched to frames of `frame_s` seconds."""
    model, features = demo.load(), demo.manifest.features
    samples = np.concatenate([read_audio(file, features.sample_rate) for file in clips()])
    log_probs = model.ctc(model.encode(Fbank(features).accept(samples), CHUNK_SIZE, NUM_LEFT_CHUNKS))
    rate = frame_s * 1000 / (demo.manifest.model.subsampling_rate * features.frame_shift_ms)
    stretched: LogProbs = log_probs[(np.arange(int(len(log_probs) / rate)) * rate).astype(int)]
    return stretched


def widened(log_probs: LogProbs, vocab_size: int, blank: int) -> LogProbs:
    """Log-probabilities as of a vocabulary of `vocab_size`: tokens that are added are less probable than all others."""
    num_frames, num = log_probs.shape
    unheard = log_probs.min(axis=1, keepdims=True) - np.random.default_rng(0).random((num_frames, vocab_size))
    wide: LogProbs = unheard.astype(np.float32)
    wide[:, :num] = log_probs[:, :vocab_size]
    wide[:, [0, blank]] = wide[:, [blank, 0]]
    return wide


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"Milliseconds per chunk of {CHUNK_SIZE} encoder frames and stream, one thread, {NUM_LEFT_CHUNKS} left chunks,",
        f"medians of {results['repetitions']} rounds ({machine['processor']}, onnxruntime {machine['onnxruntime']},",
        f"commit {machine['commit']}), and what our own code takes beside the encoder: at most {LIMIT:.0%} was asked",
        "of one stream of 225 M parameters. Posteriors: *speech*, of the demo model for the clips; *blank*, those of",
        f"them with blank above {BLANK}; *own*, of the bundle itself, which are not like speech with random weights.",
        "",
        "| bundle | posteriors | streams | encoder | CTC head | features | search | state | own / encoder |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for item in results["cases"]:
        times = {stage: spread["median"] * 1000 for stage, spread in item["chunk_s"].items()}
        cells = (f"{times[stage]:.2f}" for stage in ("encoder", "ctc", *OWN_STAGES))
        share = item["shares"]["own"]["median"]
        lines.append(
            f"| {item['bundle']} | {item['posteriors']} | {item['num_streams']} | {' | '.join(cells)} | {share:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", help="folders of bundles that can stream")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the results; the table is printed")
    args = parser.parse_args(arguments)
    bundles = {_name(path): Bundle.open(path) for path in args.bundles}
    cases = measure_overhead(bundles, args.repetitions, lambda line: print(f"- {line}", flush=True))
    results = {"machine": describe_machine(), "repetitions": args.repetitions, "cases": cases}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def _name(path: Path) -> str:
    """dense-225m/int8 of /somewhere/dense-225m/int8."""
    return "/".join(path.resolve().parts[-2:])


if __name__ == "__main__":
    main()
