"""Writes the results of WeNet's own searches for twenty recordings: python recordings.py WENET [NAME...]. The
configurations are those of `configurations/`; networks and recordings are those of `tests/toys/golden_recordings.py`.
Recordings with two nearly equally likely hypotheses are left out, because rounding would choose between them."""

import itertools
import json
import lzma
import sys
import tempfile
from pathlib import Path

import torch
import wenet_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "toys"))

import golden_recordings as golden
from wenet_directories import write_configuration

from u2moe.export.checkpoint import Checkpoint

NEAR = 1e-3
"""Log-probabilities of a sequence differ by less between implementations; those of frames differ by 1e-5."""


def heard(model, encoded):
    """Return hypotheses, their times and the decoder's choice; None if two are nearly equally likely."""
    from wenet.models.transformer import search  # noqa: PLC0415 - after `import_from`

    lengths = torch.tensor([encoded.shape[1]])
    (found,) = search.ctc_prefix_beam_search(model.ctc.log_softmax(encoded), lengths, golden.BEAM_SIZE)
    if min(a - b for a, b in itertools.pairwise(sorted(found.nbest_scores, reverse=True))) < NEAR:
        return None
    chosen = None
    if model.decoder is not None:
        memory, lens = encoded, lengths
        if getattr(model, "apply_non_blank_embedding", False):
            memory, mask = model.filter_blank_embedding(model.ctc.log_softmax(encoded), encoded)
            lens = mask.squeeze(1).sum(1)
        rescored = search.attention_rescoring(model, [found], memory, lens, **golden.WEIGHTS)
        chosen = [list(tokens) for tokens in found.nbest].index(list(rescored[0].tokens))
    return [[list(tokens) for tokens in found.nbest], found.nbest_times, chosen]


@torch.no_grad()
def found_by(name):
    """Return the entry of one configuration in `golden_recordings.known`."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_configuration(name, Path(folder), blank_bias=golden.BLANK_BIAS)
        model, checkpoint = wenet_model.load(directory), Checkpoint.open(directory)
    reduction = checkpoint.architecture.encoder.frame_reduction
    streaming = checkpoint.architecture.encoder.streaming and wenet_model.streams(model.encoder)
    results = {"recordings": [], "whole": [], **({"chunks": []} if streaming else {})}
    number = 0
    while len(results["recordings"]) < golden.NUM_RECORDINGS:
        batch = torch.from_numpy(golden.features(number, checkpoint.features)).unsqueeze(0)
        encoded = {"whole": model.encoder(batch, torch.tensor([batch.shape[1]]), -1, -1)[0]}
        if streaming:
            chunks = golden.CHUNK_SIZE * reduction, golden.NUM_LEFT_CHUNKS
            encoded["chunks"] = wenet_model.streamed(model.encoder, batch, *chunks)
        each = {how: heard(model, output) for how, output in encoded.items()}
        if None not in each.values():
            results["recordings"].append(number)
            for how, result in each.items():
                results[how].append(result)
        number += 1
    return results


if __name__ == "__main__":
    wenet_model.import_from(sys.argv[1])
    torch.set_num_threads(1)
    everything = golden.known()
    for each in sys.argv[2:] or list(everything):
        found, before = found_by(each), everything.get(each)
        everything[each] = found
        lengths = [len(hypotheses[0]) for hypotheses, _, _ in found["whole"]]
        print(each, "as before" if found == before else "new", found["recordings"][-1], lengths, flush=True)
    text = json.dumps(dict(sorted(everything.items())), separators=(",", ":"))
    golden.FILE.write_bytes(lzma.compress(text.encode()))
