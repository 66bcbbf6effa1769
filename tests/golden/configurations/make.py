"""Computes golden files of configurations with WeNet's own code: python make.py WENET NAME..., see README.md. Existing
files are compared, not written."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
sys.path += [str(FOLDER.parent), str(FOLDER.parents[1] / "toys")]

import wenet_model  # noqa: E402 - in the folders above
from packed import read_arrays, write_arrays  # noqa: E402
from wenet_directories import CONFIGURATIONS, digest, write_configuration  # noqa: E402

FRAMES, CTC_FRAMES = 99, 4


def make(name, digests):
    """Write or compare one file, and return a line that reports it."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_configuration(name, Path(folder), vocab_size=31)
        digests[name] = digest(directory)
        model = wenet_model.load(directory)
    features = read_arrays(FOLDER / "features.npy.xz")[f"mel_{input_size(name)}"]
    results = wenet_model.outputs(model, features.astype(np.float32))
    results["ctc_log_probs"] = results["ctc_log_probs"][:CTC_FRAMES]
    path = FOLDER / f"{name}.npy.xz"
    if not path.exists():
        write_arrays(path, results)
        return f"{name}: written, {path.stat().st_size} bytes"
    known = read_arrays(path)
    if set(known) != set(results):
        return f"{name}: DIFFERS: has {sorted(known)}, now {sorted(results)}"
    return f"{name}: {max(float(np.abs(known[key] - results[key]).max()) for key in results):.2g} from the file"


def input_size(name):
    """Return the width of the features of a configuration."""
    return CONFIGURATIONS[name].get("num_mel_bins", 80)


if __name__ == "__main__":
    wenet_model.import_from(sys.argv[1])
    torch.set_num_threads(1)
    path = FOLDER / "digests.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    for each in sys.argv[2:] or CONFIGURATIONS:
        print(make(each, known), flush=True)
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
