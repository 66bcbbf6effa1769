"""Random checkpoints: of the golden networks, and of the configurations that golden/configurations lists."""

import hashlib
import json
from pathlib import Path

import torch
import yaml

from u2moe.export.random_checkpoint import old_layout, random_config, write_random_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "configurations"
PAIRS = json.loads((FOLDER / "pairs.json").read_text(encoding="utf-8"))
CONFIGURATIONS = yaml.safe_load((FOLDER / "configurations.yaml").read_text(encoding="utf-8")) | PAIRS


def write_golden(name, folder):
    """Write the checkpoint of `moe_tiny` or `dense_tiny`; returns its folder."""
    config = yaml.safe_load((GOLDEN / name / "train.yaml").read_text(encoding="utf-8"))
    write_random_checkpoint(folder, config, seed=2)  # of twelve the one with the widest margins of routers and searches
    return folder


def configured(arguments):
    """The train.yaml of one configuration, and what is added to the bias of the blank."""
    arguments = dict(arguments)
    old, blank_bias = arguments.pop("old_layout", False), arguments.pop("blank_bias", 0.0)
    config = random_config(**arguments)
    return old_layout(config) if old else config, blank_bias


def write_configuration(name, folder, **defaults):
    """Write the checkpoint of one configuration; `defaults` are arguments of `random_config`. Returns its folder."""
    config, blank_bias = configured({**defaults, **CONFIGURATIONS[name]})
    write_random_checkpoint(folder, config, seed=1)
    if blank_bias:
        state = torch.load(folder / "final.pt", weights_only=True)
        state["ctc.ctc_lo.bias"][0] += blank_bias
        torch.save(state, folder / "final.pt")
    if "lora_conf" in config:
        add_adapters(folder, config["lora_conf"])
    return folder


def add_adapters(folder, conf):
    """LoRA adapters beside the weights that `lora_conf` names, in a file as training writes it after some steps."""
    generator, state = torch.Generator().manual_seed(5), torch.load(folder / "final.pt", weights_only=True)
    for name in [name.removesuffix(".weight") for name in state if name.endswith(".weight")]:
        parts = name.split(".")
        if name.startswith(tuple(conf["lora_modules"])) and parts[-1] in conf["lora_list"]:
            size, rank = state[f"{name}.weight"].shape[0], conf["lora_rank"]
            state[f"{name}.lora_A"] = torch.rand(rank, size, generator=generator) - 0.5
            state[f"{name}.lora_B"] = (torch.rand(size, rank, generator=generator) - 0.5) * 0.2
    torch.save(state, folder / "step_100.pt")
    (folder / "final.pt").unlink()
    (folder / "final.pt").symlink_to("step_100.pt")


def digest(directory):
    """Of a state dict, as golden/configurations/README.md says."""
    state = torch.load(directory / "final.pt", weights_only=True)
    result = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith(".pe"):
            result.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}\n".encode())
            result.update(state[name].numpy().tobytes())
    return result.hexdigest()
