"""What other recognisers that install with a model hear of the test sets, and their word error rates, as JSON.

Each is installed into an environment of its own, is given whole recordings, and goes on where it was stopped. Numbers
that they write as digits are read in the way that has the fewest errors.
"""

import argparse
from pathlib import Path

from evaluate import Count
from readings import num_errors

from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.benchmarks.studies.shared.process import PeerProcess, single_core, write_wav
from u2moe.benchmarks.studies.systems import PEERS, environment
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import words

SAMPLE_RATE = 16000
WHOLE_S = 60.0
"""Recordings are given in portions of this length: none is longer."""


def hear(name: str, process: PeerProcess, recordings: list[Recording], folder: Path) -> dict[str, str]:
    """The text of each recording by its path, kept in a TSV file line by line."""
    file, wav = folder / f"{name}.tsv", folder / f"{name}.wav"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    texts = dict(line.split("\t") for line in lines)
    with file.open("a", encoding="utf-8") as rows:
        for recording in recordings:
            if str(recording.path) not in texts:
                write_wav(wav, read_audio(recording.path, SAMPLE_RATE), SAMPLE_RATE)
                text = " ".join(process.recognise(wav, WHOLE_S)["text"].split())
                texts[str(recording.path)] = text
                rows.write(f"{recording.path}\t{text}\n")
                rows.flush()
    return texts


def count(recordings: list[Recording], texts: dict[str, str]) -> Count:
    """Word errors of one test set."""
    found = Count()
    for recording in recordings:
        errors = num_errors(recording.transcript, texts[str(recording.path)])
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
        python = environment(name, folder)["python"]
        with (
            single_core(),
            PeerProcess(PEERS[name].engine, dict(PEERS[name].options), python=python) as peer,
        ):
            own = content.setdefault(name, {"title": PEERS[name].title, "sets": {}})
            own["versions"] = peer.started["versions"]
            for set_name, recordings in sets.items():
                found = count(recordings, hear(name, peer, recordings, folder)).data()
                own["sets"][set_name] = found
                write_json(result, content)
                print(name, set_name, f"{found['wer']:.1%}", flush=True)


if __name__ == "__main__":
    main()
