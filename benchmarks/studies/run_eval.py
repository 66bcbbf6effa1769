"""The Open ASR Leaderboard's `run_eval.py` for bundles, on any list with transcripts that `u2moe corpus` reads.

    PYTHONPATH=open_asr_leaderboard python -m u2moe.benchmarks.studies.run_eval --model_id demo --dataset data.list

Its columns, its RTFx, and its normaliser if a checkout of it is in the path. Otherwise that of the package
whisper-normalizer, which treats 4 % of the sentences in `examples/train_demo` in another way. The leaderboard's tools
read and score what is written to results/.
"""

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from u2moe.runtime import Recognizer
from u2moe.runtime.corpus.lists import read_utterances
from u2moe.runtime.corpus.sources import Sources
from u2moe.runtime.text.word_errors import edit_distance

NORMALIZERS = ("normalizer", "whisper_normalizer.english")
LEFT_OUT = ("", "ignore time segment in scoring")
"""References that the leaderboard does not count."""


def english_normalizer() -> Callable[[str], str]:
    """The first of `NORMALIZERS` that is installed."""
    for name in NORMALIZERS:
        if importlib.util.find_spec(name.partition(".")[0]):
            found: Callable[[str], str] = importlib.import_module(name).EnglishTextNormalizer()
            return found
    raise SystemExit("no normaliser: pip install whisper-normalizer, or put the leaderboard's checkout into PYTHONPATH")


def main(argv: list[str] | None = None) -> None:
    """Recognise a list, write the rows, and print the word error rate and RTFx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="demo", help="bundle: a folder, or org/name on a hub (default: demo)")
    parser.add_argument("--dataset", required=True, help="a list with transcripts")
    parser.add_argument("--split", default="test", help="for the name of the file (default: test)")
    parser.add_argument("--max_eval_samples", type=int, help="no more than so many")
    args = parser.parse_args(argv)
    normalize, recognizer = english_normalizer(), Recognizer.from_pretrained(args.model_id)
    rate = recognizer.bundle.manifest.features.sample_rate
    recognizer.warm_up()
    rows: list[dict[str, str | float]] = []
    errors = num_words = 0
    with Sources() as sources:
        for utterance in read_utterances(args.dataset):
            reference = utterance.text or ""
            if reference.strip() in LEFT_OUT or normalize(reference) in LEFT_OUT:
                continue
            if len(rows) == args.max_eval_samples:
                break
            samples = np.concatenate(list(sources.read_blocks(utterance, rate)))
            begin = time.perf_counter()
            text = recognizer.transcribe(samples).text
            seconds, duration = time.perf_counter() - begin, len(samples) / rate
            source = str(utterance.source)
            rows.append(
                {"audio_filepath": source, "duration": duration, "time": seconds, "text": reference, "pred_text": text}
            )
            expected = normalize(reference).split()
            errors += edit_distance(expected, normalize(text).split())
            num_words += len(expected)
    if not num_words:
        raise SystemExit(f"{args.dataset}: has no transcripts")
    model, dataset = (name.strip("./").replace("/", "-") for name in (args.model_id, args.dataset))
    path = Path("results") / f"MODEL_{model}_DATASET_{dataset}_{dataset}_{args.split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print("Results saved at path:", path.absolute())
    total = {key: sum(float(row[key]) for row in rows) for key in ("duration", "time")}
    print("WER:", round(100 * errors / num_words, 2), "%", "RTFx:", round(total["duration"] / total["time"], 2))


if __name__ == "__main__":
    main()
