"""Measures other recognisers that install with a model on the test sets: texts and word error rates, as JSON.

Each is installed into a separate environment and receives whole recordings. Numbers written as digits are read in the
way that has the fewest errors.
"""

import argparse
import tempfile
from pathlib import Path

from evaluate import Count
from readings import num_errors

from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.benchmarks.studies.shared.programs import Line, Program, engine, on_one_core, write_wav
from u2moe.benchmarks.studies.systems import PEERS, environment
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import words

SAMPLE_RATE = 16000
WHOLE_S = 60.0
"""Length of the buffers in which recordings are passed. It exceeds the length of every recording."""


def hear(program: Program, recordings: list[Recording]) -> list[Line]:
    """Return the output of a recogniser for each recording."""
    with tempfile.TemporaryDirectory() as folder:
        files = [write_wav(Path(folder) / f"{number}.wav", read_audio(recording.path, SAMPLE_RATE), SAMPLE_RATE)
                 for number, recording in enumerate(recordings)]  # fmt: skip
        return program.run(files)[0]


def count(recordings: list[Recording], lines: list[Line]) -> Count:
    """Return the word errors of one test set."""
    found = Count()
    for recording, line in zip(recordings, lines, strict=True):
        errors = num_errors(recording.transcript, line["text"])
        found.add(errors, len(words(recording.transcript)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["pocketsphinx", "moonshine"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    folder = args.work_dir / "peers"
    manifests = {file.stem: read_recordings(file) for file in sorted((args.work_dir / "test").glob("*.tsv"))}
    sets = dict(sorted(manifests.items(), key=lambda item: len(item[1])))
    folder.mkdir(exist_ok=True)
    result = args.output / "peers.json"
    content = read_json(result)
    for name in args.peers:
        peer, python = PEERS[name], environment(name, folder)["python"]
        program = on_one_core(engine(peer.engine, peer.options, python=python, buffer_s=WHOLE_S))
        own = content.setdefault(name, {"title": peer.title, "sets": {}})
        for set_name, recordings in sets.items():
            lines = hear(program, recordings)
            found = count(recordings, lines).data()
            own["versions"], own["sets"][set_name] = lines[0]["versions"], found
            write_json(result, content)
            print(name, set_name, f"{found['wer']:.1%}", flush=True)


if __name__ == "__main__":
    main()
