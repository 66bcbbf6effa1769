"""Alignments by torchaudio's `forced_align`, which WeNet's `force_align` calls: python alignments.py Writes
`alignments.json`, or compares it if it exists."""

import json
import sys
from pathlib import Path

import torch
from torchaudio.functional import forced_align

sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))
from searches import random_log_probs

CASES = ((3, 4, 2), (40, 5, 12), (60, 3, 25), (200, 30, 60), (90, 4, 2))
"""Frames, size of the vocabulary, tokens to align."""


def main() -> None:
    found = []
    for seed, (num_frames, vocab_size, num_tokens) in enumerate(CASES):
        drawn = torch.randint(1, vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
        log_probs = torch.from_numpy(random_log_probs(seed, num_frames, vocab_size, scale=3.0))
        path, _ = forced_align(log_probs[None], drawn.int(), blank=0)
        found.append({"seed": seed, "vocab_size": vocab_size, "tokens": drawn[0].tolist(), "path": path[0].tolist()})
    file = Path(__file__).with_name("alignments.json")
    if file.exists():
        print("the same" if json.loads(file.read_text(encoding="utf-8")) == found else "DIFFERENT")
    else:
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
