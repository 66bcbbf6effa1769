"""Word error rates of a bundle on every test set, by context and search, as JSON and as a Markdown table."""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from spelling import normalize

from u2moe.runtime import Bundle, attention_rescoring, ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.audio import read_audio
from u2moe.runtime.corpus.word_errors import Recording, WordErrors, read_manifest
from u2moe.runtime.features import fbank
from u2moe.runtime.model import Model

CHUNK_SIZES = (None, 16, 8)
SEARCHES = ("ctc_greedy", "ctc_prefix_beam", "attention_rescoring")
BEAM_SIZE = 10


@dataclass(kw_only=True)
class Count:
    """Errors of one test set under one condition."""

    words: WordErrors = field(default_factory=WordErrors)
    num_utterances: int = 0
    num_exact: int = 0

    def add(self, transcript: str, text: str) -> None:
        """Counts one utterance."""
        self.words.add(transcript, text)
        self.num_utterances += 1
        self.num_exact += transcript.split() == text.split()


def texts(bundle: Bundle, model: Model, recording: Recording) -> Iterator[tuple[int | None, str, str]]:
    """What each search hears in a recording: chunk size, search, text."""
    features, decoding = bundle.manifest.features, bundle.manifest.decoding
    frames = fbank(read_audio(recording.path, features.sample_rate), features)
    for chunk_size in CHUNK_SIZES:
        encoder_out = model.encode(frames, chunk_size)
        log_probs = model.ctc(encoder_out)
        best = ctc_greedy_search(log_probs, model.config.blank)
        beam = ctc_prefix_beam_search(log_probs, BEAM_SIZE, model.config.blank)
        scores = model.token_scores(encoder_out, [hypothesis.tokens for hypothesis in beam])
        rescored = attention_rescoring(beam, scores, decoding.ctc_weight, decoding.reverse_weight)
        for search, found in zip(SEARCHES, (best, beam[0], rescored[0].hypothesis), strict=True):
            yield chunk_size, search, bundle.vocabulary.text(found.tokens)


def markdown(results: dict[str, dict[str, Count]]) -> str:
    """A row for each test set, a column for each context and search."""
    columns = list(next(iter(results.values())))
    lines = ["| test set | utterances | words | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 3)]
    for name, counts in results.items():
        first = next(iter(counts.values()))
        rates = " | ".join(f"{count.words.rate:.1%}" for count in counts.values())
        lines.append(f"| {name} | {first.num_utterances} | {first.words.num_words} | {rates} |")
    return "\n".join(lines) + "\n"


def score(bundle_path: Path, manifest: Path) -> tuple[dict[str, Count], list[str]]:
    """Counts of one test set by condition; and per recording what was said and what the second pass heard of it all."""
    bundle = Bundle.open(bundle_path)
    model = bundle.load()
    counts: dict[str, Count] = {}
    lines = []
    for recording in read_manifest(manifest):
        for chunk_size, search, text in texts(bundle, model, recording):
            condition = f"{chunk_size or 'full'} {search}"
            counts.setdefault(condition, Count()).add(recording.transcript, normalize(text))
            if chunk_size is None and search == "attention_rescoring":
                lines.append(f"{recording.path.name}\t{recording.transcript}\t{text}\n")
    return counts, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "heard").mkdir(exist_ok=True)
    manifests = sorted((args.work_dir / "test").glob("*.tsv"))
    results: dict[str, dict[str, Count]] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = {manifest.stem: pool.submit(score, args.bundle, manifest) for manifest in manifests}
        for name, job in jobs.items():
            results[name], lines = job.result()
            (args.work_dir / "heard" / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
            print(
                name, {condition: f"{count.words.rate:.1%}" for condition, count in results[name].items()}, flush=True
            )
    plain = {
        name: {
            condition: {
                "num_words": count.words.num_words, "num_errors": count.words.num_errors, "wer": count.words.rate,
                "num_utterances": count.num_utterances, "num_exact": count.num_exact,
            }
            for condition, count in counts.items()
        }
        for name, counts in results.items()
    }  # fmt: skip
    (args.output / "wer.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    (args.output / "wer.md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
