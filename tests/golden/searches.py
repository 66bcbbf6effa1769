"""Computes `reference.npy.xz` and `reference.json.gz` with WeNet's own code: python searches.py WENET, see README.md.
Existing files are compared, not written."""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
sys.path += [str(FOLDER), str(FOLDER.parent / "toys")]

import wenet_model  # noqa: E402 - in the folders above
from packed import read_arrays, write_arrays  # noqa: E402
from wenet_directories import write_golden  # noqa: E402

MODES = {"full": None, "stream16_-1": -1, "stream16_4": 4, "stream16_1": 1, "stream16_0": 0}
WEIGHTS = [(ctc, reverse) for ctc in (0.0, 0.3, 0.5) for reverse in (0.0, 0.3)]
LONGEST_BY_TOKEN = 131
"""Largest number of feature frames for attention beam search, which runs the decoder for each token."""


@torch.no_grad()
def references(model, features):
    """Return arrays and results of one utterance; features [frames, bins]."""
    from wenet.utils.ctc_utils import gen_ctc_peak_time, gen_timestamps_from_peak  # noqa: PLC0415 - after `import_from`

    try:  # its place at commit 0154699, and its present one
        from wenet.transformer import search  # noqa: PLC0415
    except ImportError:
        from wenet.models.transformer import search  # noqa: PLC0415
    arrays, results = {}, {}
    batch, lengths = torch.from_numpy(features).unsqueeze(0), torch.tensor([len(features)])
    for mode, left in MODES.items():
        if mode == "full":
            out, _ = model.encoder(batch, lengths, -1, -1)
        else:
            out, _ = model.encoder.forward_chunk_by_chunk(batch, 16, left)
        log_probs, times = model.ctc.log_softmax(out), torch.tensor([out.shape[1]])
        arrays |= {f"{mode}/out": out[0].numpy(), f"{mode}/ctc_logprobs": log_probs[0].numpy()}
        peaks = gen_ctc_peak_time(log_probs[0].argmax(dim=1).tolist())
        beam = search.ctc_prefix_beam_search(log_probs, times, 10)
        found = {
            "ctc_greedy_search": {"tokens": search.ctc_greedy_search(log_probs, times)[0].tokens},
            "ctc_peaks": peaks,
            "peak_timestamps": gen_timestamps_from_peak(peaks, out.shape[1] * 0.04, frame_rate=0.04),
            "ctc_prefix_beam_search": {key: vars(beam[0])[key] for key in ("nbest", "nbest_scores", "nbest_times")},
        }
        for ctc, reverse in WEIGHTS:
            best = search.attention_rescoring(model, beam, out, times, ctc, reverse)[0]
            keys = ("tokens", "score", "confidence", "times", "tokens_confidence")
            found[f"attention_rescoring ctc={ctc} rev={reverse}"] = {key: vars(best)[key] for key in keys}
        if len(features) <= LONGEST_BY_TOKEN:
            mask = torch.ones(1, 1, out.shape[1], dtype=torch.bool)
            for penalty in (0.0, 0.6):
                best = search.attention_beam_search(model, out, mask, 5, penalty)[0]
                found[f"attention beam=5 length_penalty={penalty}"] = {"tokens": best.tokens}
        results[mode] = found
        if mode == "full":
            scores = wenet_model.scores(model, out, beam[0].nbest)
            arrays |= {f"full/{name}": scores[name].numpy() for name in ("score", "r_score")}
    return arrays, results


def numbers(value):
    """Yield all numbers in a structure, in order."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers(value[key])]
    if isinstance(value, (list, tuple)):
        return [number for each in value for number in numbers(each)]
    return np.ravel(value).astype(np.float64).tolist()


def difference(known, found):
    """Return the largest difference of two structures; infinite if one has more numbers."""
    pairs = numbers(known), numbers(found)
    return float("inf") if len(pairs[0]) != len(pairs[1]) else float(np.abs(np.subtract(*pairs)).max())


def make(name):
    """Write or compare the files of one network, and return a line that reports it."""
    with tempfile.TemporaryDirectory() as folder:
        model = wenet_model.load(write_golden(name, Path(folder)))
    arrays, results = {}, {}
    features = read_arrays(FOLDER / "utterances.npy.xz")
    for utterance in ("u300", "u131", "u67", "u15"):
        own, results[utterance] = references(model, features[utterance].astype(np.float32))
        arrays |= {f"{utterance}/{key}": value for key, value in own.items()}
    path, texts = (FOLDER / name / f"reference.{kind}" for kind in ("npy.xz", "json.gz"))
    if not path.exists():
        write_arrays(path, distinct(arrays))
        text = json.dumps(results, separators=(",", ":"))
        texts.write_bytes(gzip.compress(f"{text}\n".encode(), mtime=0))
        return f"{name}: written, {path.stat().st_size} and {len(text)} bytes"
    known = json.loads(gzip.decompress(texts.read_bytes()))
    furthest = difference(read_arrays(path), distinct(arrays))
    return f"{name}: {furthest:.2g} and {difference(known, results):.2g} from the files"


def distinct(arrays):
    """Return the arrays that do not equal full context, or all left chunks."""
    kept = {}
    for key, array in arrays.items():
        utterance, _, name = key.split("/")
        others = [kept.get(f"{utterance}/{mode}/{name}") for mode in ("full", "stream16_-1")]
        if not any(np.array_equal(array, other) for other in others if other is not None):
            kept[key] = array
    return kept


if __name__ == "__main__":
    wenet_model.import_from(sys.argv[1])
    torch.set_num_threads(1)
    for each in sys.argv[2:] or ("moe_tiny", "dense_tiny"):
        print(make(each), flush=True)
