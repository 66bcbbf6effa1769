"""Every accepted configuration against WeNet's own outputs (see golden/configurations/README.md), and LoRA adapters."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import read_arrays
from wenet_directories import CONFIGURATIONS, PAIRS, configured, digest, write_configuration

from u2moe.export import proofs
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.exporter import export_bundle
from u2moe.export.training_config import parse_training_config
from u2moe.runtime import CheckpointError, UnsupportedError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_networks")]

GOLDEN = Path(__file__).parent / "golden" / "configurations"
FEATURES = read_arrays(GOLDEN / "features.npy.xz")
DIGESTS = json.loads((GOLDEN / "digests.json").read_text(encoding="utf-8"))
HYPOTHESES = [[5, 9, 3, 11, 4], [7, 6, 5], [], [12]]
# Single precision on outputs of size 1, through three blocks at most.
LIMIT = 2e-5


def stream(encoder, features, chunk_size, num_left_chunks):
    """Process chunks with caches, like WeNet's forward_chunk_by_chunk; the size counts frames after subsampling."""
    rate, context = encoder.config.subsampling_rate // encoder.config.frame_reduction, encoder.config.right_context
    caches, outputs, offset = None, [], 0
    for start in range(0, features.shape[1] - context, rate * chunk_size):
        window = features[:, start : start + (chunk_size - 1) * rate + context + 1]
        required = chunk_size // encoder.config.frame_reduction * num_left_chunks
        output, caches = encoder.forward_chunk(window, offset, caches, required)
        offset += output.shape[1]
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def outputs_of(network, features):
    full, _ = network.encoder(features, torch.tensor([features.shape[1]]))
    results = {"full": full[0], "ctc_log_probs": network.ctc(full[:, :4])[0]}
    if network.config.encoder.streaming:
        size = 12 if network.config.encoder.frame_reduction > 1 else 4
        results[f"stream_{size}_1"] = stream(network.encoder, features, size, 1)[0]
    if network.decoder is not None:
        lengths = torch.tensor([len(tokens) for tokens in HYPOTHESES])
        padded = torch.tensor([tokens + [0] * (5 - len(tokens)) for tokens in HYPOTHESES])
        rows = len(HYPOTHESES)
        memory_lengths = torch.full((rows,), full.shape[1])
        score, r_score, following = network.score(padded, lengths, full.expand(rows, -1, -1), memory_lengths)
        results |= {"score": score, "next_log_probs": following}
        if r_score is not None:
            results["r_score"] = r_score
    return results


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_network_equals_wenet(tmp_path, name):
    write_configuration(name, tmp_path, vocab_size=31)
    assert name in PAIRS or digest(tmp_path) == DIGESTS[name]  # other weights would also give other outputs
    checkpoint = Checkpoint.open(tmp_path)
    features = FEATURES[f"mel_{checkpoint.features.num_mel_bins}"].astype(np.float32)
    with torch.no_grad():
        results = outputs_of(checkpoint.network(), torch.from_numpy(features).unsqueeze(0))
    expected = read_arrays(GOLDEN / f"{name}.npy.xz")
    assert results.keys() == expected.keys()
    for key, value in results.items():
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=LIMIT, err_msg=key)


def test_the_tables_list_what_is_proved_and_other_pairs_are_refused(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("pairs", GOLDEN / "pairs.py")
    pairs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pairs)
    proved = pairs.proved_pairs()
    assert proofs.proved() == pairs.table(proved)
    assert pairs.START + pairs.page(proved) + pairs.END in pairs.PAGE.read_text(encoding="utf-8")
    # From networks other than the compared ones
    drawn = pairs.networks(random.Random(2), 60)
    assert {arguments["encoder"] for arguments, _ in drawn} == set(pairs.KINDS)
    for arguments, _ in drawn:
        proofs.check_proved("", parse_training_config(configured(arguments)[0]).architecture)
    # As if no network of that kind had been compared with such frames
    table = json.loads(json.dumps(proofs.proved()))
    row = table["encoder"]["encoder conformer"]
    row["input_layer"] = row["input_layer"].replace("conv2d8", "")
    monkeypatch.setattr(proofs, "proved", lambda: table)
    checkpoint = write_configuration("mel_40", tmp_path / "checkpoint")
    message = "checkpoint: encoder with encoder conformer and input_layer conv2d8 is not proved equal to WeNet: no netw"
    with pytest.raises(UnsupportedError, match=message):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    proofs.check_proved("", parse_training_config(configured(PAIRS["pair_1"])[0]).architecture)


ADAPTED = "encoder.encoders.1.self_attn.linear_v"


@pytest.fixture
def folder(tmp_path):
    return write_configuration("lora", tmp_path)


def test_adapters_are_added_unless_the_weights_contain_them(folder):
    state = torch.load(folder / "step_100.pt", weights_only=True)
    weight, up, down = (state[f"{ADAPTED}.{part}"] for part in ("weight", "lora_B", "lora_A"))
    found = Checkpoint.open(folder).tensors[f"{ADAPTED}.weight"]  # adapters of a step
    torch.testing.assert_close(found, weight + up @ down * 4 / 3, rtol=0, atol=1e-6)
    assert not torch.equal(found, weight)
    (folder / "step_100.pt").rename(folder / "epoch_3.pt")
    checkpoint = Checkpoint.open(folder, "epoch_3.pt")
    assert torch.equal(checkpoint.tensors[f"{ADAPTED}.weight"], weight)
    assert checkpoint.ignored[f"{ADAPTED}.lora_A"] == "an adapter that its weight already contains"
    added = Checkpoint.open(folder, "epoch_3.pt", lora="add")
    assert torch.equal(added.tensors[f"{ADAPTED}.weight"], found)
    (folder / "epoch_3.pt").rename(folder / "avg_5.pt")
    with pytest.raises(CheckpointError, match=r"avg_5.pt: has LoRA adapters: use --lora contained .*, or --lora add"):
        Checkpoint.open(folder, "avg_5.pt")
    Checkpoint.open(folder, "avg_5.pt", lora="contained")


@pytest.mark.parametrize(("ending", "tensor", "message"), [
    ("A", torch.zeros(2, 32), r"linear_v.lora_B and .lora_A have shapes .*\(2, 32\).*, but lora_rank 3"),
    ("B", None, r"linear_v: weight, lora_B and lora_A have shapes \[\(32, 32\), None, \(3, 32\)\]"),
    ("A", torch.full((3, 32), torch.nan), "linear_v.weight has values that are not finite"),
    ("", None, "lora_A"),
])  # fmt: skip
def test_adapters_that_do_not_fit_or_have_no_configuration(folder, ending, tensor, message):
    state, text = torch.load(folder / "step_100.pt", weights_only=True), (folder / "train.yaml").read_text("utf-8")
    if ending:
        state[f"{ADAPTED}.lora_{ending}"] = tensor
    else:
        text = text.replace("lora_conf:", "lora_conf: {}\nds_config:")
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "step_100.pt")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)
