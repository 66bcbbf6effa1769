"""Runs WeNet's recipes and writes the table in docs/export.md: python recipes.py WENET. Each recipe is completed as in
WeNet's training, its layers are narrowed, and a checkpoint of random weights is exported. The bundle's output is
compared with that of WeNet's own code on the same features."""

import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import wenet_model
import yaml

from u2moe.export import export_bundle
from u2moe.export.random_checkpoint import write_random_checkpoint
from u2moe.export.training_config import MODELS
from u2moe.runtime.errors import CheckpointError, UnsupportedError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
START, END = "<!-- recipes: written by tests/golden/recipes.py -->\n", "<!-- end of recipes -->\n"
VOCAB_SIZE = 31
NARROW = {"linear_units": 48, "cgmlp_linear_units": 48, "gate_linear_units": 24, "num_blocks": 2, "r_num_blocks": 1}
"""Sizes without influence on the result. Encoders with blocks selected by number keep `num_blocks`."""
BY_NUMBER = ("efficientConformer", "squeezeformer")
SECTIONS = ("model", "tokenizer", "ctc", "cmvn")
LIMIT = 1e-4
"""Largest difference of log-probabilities; single precision through a network of this size causes a tenth of it."""


def completed(path):
    """Return a recipe as training saves it beside the weights."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    dataset, collate = config.get("dataset_conf") or {}, config.get("collate_conf") or {}
    sections = ("fbank_conf", "mfcc_conf", "log_mel_spectrogram_conf")
    front_end = next((dataset[name] for name in sections if name in dataset), None)
    front_end = front_end or collate.get("feature_extraction_conf", {})
    size = front_end.get("num_mel_bins", front_end.get("mel_bins"))
    return {**config, "input_dim": size, "output_dim": VOCAB_SIZE, "vocab_size": VOCAB_SIZE}


def narrowed(config):
    """Return the same network with narrow layers."""
    encoder, decoder = dict(config["encoder_conf"]), dict(config["decoder_conf"])
    dim = 8 * math.lcm(encoder["attention_heads"], decoder["attention_heads"])
    for conf in (encoder, decoder):
        conf.update({name: NARROW[name] for name in NARROW if name in conf})
    if config["encoder"] in BY_NUMBER:
        encoder["num_blocks"] = config["encoder_conf"]["num_blocks"]
    encoder.update({name: dim for name in ("output_size", "encoder_dim") if name in encoder})
    return {**config, "encoder_conf": encoder, "decoder_conf": decoder}


def judged(config):
    """Return the result of a recipe as text, and whether it was accepted."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
            write_random_checkpoint(checkpoint, narrowed(config), seed=1)
            exported, _ = export_bundle(checkpoint, bundle)
            worst, streaming = difference(exported, wenet_model.load(checkpoint))
    except (CheckpointError, UnsupportedError) as error:
        return f"refused: {str(error).removeprefix('train.yaml: ')}", False
    if not worst <= LIMIT:
        return f"DIFFERS by {worst:.2g}", False
    return "equal" if streaming else "equal, full context only", True


def difference(bundle, model):
    """Return the largest difference of log-probabilities from WeNet's, in both modes, and whether there are chunks."""
    ours = bundle.load()
    random = np.random.default_rng(7)
    features = (11 + 3 * random.standard_normal((203, bundle.manifest.model.feature_size))).astype(np.float32)
    expected = wenet_model.outputs(model, features)
    memory = ours.encode(features)
    pairs = [(ours.ctc(memory), expected["ctc_log_probs"])]
    streaming = bundle.manifest.model.streaming
    key = next((key for key in expected if key.startswith("stream")), None)
    if streaming and key:
        chunked = model.ctc.log_softmax(torch.from_numpy(expected[key]).unsqueeze(0))[0].detach().numpy()
        size = int(key.split("_")[1]) // bundle.manifest.model.frame_reduction
        pairs.append((ours.ctc(ours.encode(features, chunk_size=size, num_left_chunks=1)), chunked))
    if "score" in expected:
        left, right = ours.rescore(memory, wenet_model.HYPOTHESES)
        pairs.append((left, expected["score"].sum(axis=1)))
        if "r_score" in expected:
            pairs.append((right, expected["r_score"].sum(axis=1)))
    return max(float(np.abs(np.asarray(found) - wanted).max()) for found, wanted in pairs), streaming


def table(checkout):
    """Return the table with its caption."""
    rows, accepted = [], 0
    paths = sorted(Path(checkout).glob("examples/*/*/conf/*.yaml"))
    for path in paths:
        verdict, is_accepted = judged(completed(path))
        accepted += is_accepted
        rows.append(f"| {path.relative_to(Path(checkout) / 'examples')} | {verdict} |\n".replace("/conf/", " / "))
        print(rows[-1], end="", flush=True)
    others = sum("refused: model is " in row for row in rows)
    configs = [completed(path) for path in paths]
    old = sum(not set(SECTIONS) <= config.keys() for config in configs if config.get("model", "asr_model") in MODELS)
    efficient = sum(config.get("encoder") == "efficientConformer" for config in configs)
    count = (
        f"{accepted} of WeNet's {len(paths) - others} recipes for CTC and attention are accepted. They equal WeNet "
        f"within {LIMIT:g}, on whole utterances and in chunks. The {efficient} Efficient Conformers were compared "
        f"through [an adapter](#efficient-conformers). {others} recipes train other kinds of model. `input_dim` and "
        f"`output_dim` were added to all {len(paths)} files, as training does. {old} use the layout from before the "
        f"end of 2023, without {', '.join(f'`{key}`' for key in SECTIONS)}.\n\n"
    )
    return "".join([count, "| recipe | result of `u2moe export` |\n| --- | --- |\n", *rows])


if __name__ == "__main__":
    wenet_model.import_from(sys.argv[1])
    torch.set_num_threads(1)
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + table(sys.argv[1]) + END + rest.split(END)[1], encoding="utf-8")
