"""LoRA adapters are added to the weights unless the weights already contain them; see also test_configurations."""

import pytest
import torch
from wenet_directories import write_configuration

from u2moe.export.checkpoint import Checkpoint
from u2moe.runtime import CheckpointError

LAYER = "encoder.encoders.1.self_attn.linear_v"


@pytest.fixture
def folder(tmp_path):
    return write_configuration("lora", tmp_path)


def state_of(folder):
    return torch.load(folder / "step_100.pt", weights_only=True)


def test_adapters_of_a_step_are_added(folder):
    state, found = state_of(folder), Checkpoint.open(folder).tensors[f"{LAYER}.weight"]
    expected = state[f"{LAYER}.weight"] + state[f"{LAYER}.lora_B"] @ state[f"{LAYER}.lora_A"] * 4 / 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, state[f"{LAYER}.weight"])


def test_weights_of_an_epoch_contain_them(folder):
    (folder / "step_100.pt").rename(folder / "epoch_3.pt")
    checkpoint = Checkpoint.open(folder, "epoch_3.pt")
    state = torch.load(folder / "epoch_3.pt", weights_only=True)
    assert torch.equal(checkpoint.tensors[f"{LAYER}.weight"], state[f"{LAYER}.weight"])
    assert checkpoint.ignored[f"{LAYER}.lora_A"] == "an adapter that its weight already contains"
    added = Checkpoint.open(folder, "epoch_3.pt", lora="add")
    assert not torch.equal(added.tensors[f"{LAYER}.weight"], state[f"{LAYER}.weight"])


def test_other_names_do_not_tell(folder):
    (folder / "step_100.pt").rename(folder / "avg_5.pt")
    with pytest.raises(CheckpointError, match=r"avg_5.pt: has LoRA adapters: use --lora contained .*, or --lora add"):
        Checkpoint.open(folder, "avg_5.pt")
    Checkpoint.open(folder, "avg_5.pt", lora="contained")


@pytest.mark.parametrize(("change", "message"), [
    ({".lora_A": torch.zeros(2, 32)}, r"linear_v.lora_B and .lora_A have shapes .*\(2, 32\).*, but lora_rank 3"),
    ({".lora_B": None}, r"linear_v: weight, lora_B and lora_A have shapes \[\(32, 32\), None, \(3, 32\)\]"),
    ({".lora_A": torch.full((3, 32), torch.nan)}, "linear_v.weight has values that are not finite"),
])  # fmt: skip
def test_adapters_that_do_not_fit(folder, change, message):
    state = state_of(folder)
    for ending, tensor in change.items():
        if tensor is None:
            del state[LAYER + ending]
        else:
            state[LAYER + ending] = tensor
    torch.save(state, folder / "step_100.pt")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_adapters_without_their_configuration_are_unused_tensors(folder):
    text = (folder / "train.yaml").read_text(encoding="utf-8")
    (folder / "train.yaml").write_text(text.replace("lora_conf:", "lora_conf: {}\nds_config:"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="lora_A"):
        Checkpoint.open(folder)
