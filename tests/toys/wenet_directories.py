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
    """Write the checkpoint of `moe_tiny` or `dense_tiny`, and return its folder."""
    config = yaml.safe_load((GOLDEN / name / "train.yaml").read_text(encoding="utf-8"))
    write_random_checkpoint(folder, config, seed=2)  # the one of twelve with the widest margins in routers and searches
    return folder


def configured(arguments):
    """Return the train.yaml of one configuration's network, and its other settings."""
    arguments, others = dict(arguments), {"blank_bias": 0.0, "release": "", "stated": {}, "old_layout": False}
    others |= {key: arguments.pop(key) for key in others if key in arguments}
    config = random_config(**arguments)
    is_old = others["old_layout"] or others["release"].startswith(("v1", "v2"))
    return old_layout(config) if is_old else config, others


def write_configuration(name, folder, **defaults):
    """Write the checkpoint of one configuration, and return its folder; `defaults` are arguments of `random_config`."""
    config, others = configured({**defaults, **CONFIGURATIONS[name]})
    write_random_checkpoint(folder, config, seed=1)
    if others["blank_bias"]:
        state = torch.load(folder / "final.pt", weights_only=True)
        state["ctc.ctc_lo.bias"][0] += others["blank_bias"]
        torch.save(state, folder / "final.pt")
    if others["release"]:
        write_as_released(folder, config, others["release"], others["stated"])
    if "lora_conf" in config:
        add_adapters(folder, config["lora_conf"])
    return folder


def write_as_released(folder, config, release, stated):
    """Change a checkpoint to a WeNet release's form: `stated` in encoder_conf, and the layout of its time."""
    conf = {key: value for key, value in {**config["encoder_conf"], **stated}.items() if value is not None}
    config = {**config, "encoder_conf": conf}
    if release < "v2":
        bins = config.pop("dataset_conf")["fbank_conf"]["num_mel_bins"]
        features = {"feature_type": "fbank", "mel_bins": bins, "frame_shift": 10, "frame_length": 25}
        config["collate_conf"] = {"feature_extraction_conf": {**features, "using_pitch": False}}
        state = torch.load(folder / "final.pt", weights_only=True)
        for name in [name for name in state if name.endswith(("norm1.weight", "norm_mha.weight"))]:
            layer, dim = name.rpartition("norm")[0], len(state[name])
            for part in ("concat_linear1", "concat_linear2") if layer.startswith("decoder") else ("concat_linear",):
                state |= {f"{layer}{part}.weight": torch.ones(dim, 2 * dim), f"{layer}{part}.bias": torch.ones(dim)}
        torch.save(state, folder / "final.pt")
    (folder / "train.yaml").write_text(yaml.dump(config), encoding="utf-8")


def add_adapters(folder, conf):
    """Add LoRA adapters for the weights in `lora_conf`, in a file as training writes it after some steps."""
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
    """Return the digest of a state dict, as golden/configurations/README.md defines it."""
    state = torch.load(directory / "final.pt", weights_only=True)
    result = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith(".pe"):
            result.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}\n".encode())
            result.update(state[name].numpy().tobytes())
    return result.hexdigest()
