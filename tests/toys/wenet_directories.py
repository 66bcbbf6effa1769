"""Random checkpoints: of golden networks and configurations, and some that a test changes."""

import functools
import hashlib
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from packed import read_text

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.random_checkpoint import old_layout, random_config, write_random_checkpoint
from u2moe.export.text_files import CMVN_ISTD, CMVN_MEAN
from u2moe.runtime import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "configurations"
PAIRS = json.loads(read_text(FOLDER / "pairs.json.xz"))
CONFIGURATIONS = yaml.safe_load((FOLDER / "configurations.yaml").read_text(encoding="utf-8")) | PAIRS


def write_golden(name, folder):
    """Write the checkpoint of a golden network, of a configuration or of a small network, and return its folder."""
    if name in CONFIGURATIONS:
        return write_configuration(name, folder)
    if name == "small":
        moe = {"mlp_type": "moe", "n_expert": 4}
        config = random_config(encoder_conf=moe, decoder_conf={"num_blocks": 1, "r_num_blocks": 1})
    else:
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


@functools.cache
def _random_files(config):
    """Return the files of a random checkpoint, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), json.loads(config))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


class Directory:
    """A random checkpoint whose files a test changes."""

    def __init__(self, path, *, old=False, **arguments):
        config = random_config(**arguments)
        self.path, self.config = path, old_layout(config) if old else config
        path.mkdir(exist_ok=True)
        for name, content in _random_files(json.dumps(self.config)).items():
            self.write(name, content)

    def __truediv__(self, name):
        return self.path / name

    def open(self, weights=None):
        return Checkpoint.open(self.path, weights)

    def refuses(self, message, *weights):
        with pytest.raises(CheckpointError, match=message):
            self.open(*weights)

    def write(self, name, content):
        (self / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def configure(self, **changes):
        self.write("train.yaml", yaml.dump({**self.config, **changes}))

    def state(self):
        return torch.load(self / "final.pt", weights_only=True)

    def save(self, state, **options):
        torch.save(state, self / "final.pt", **options)

    def drop(self, *names):
        self.save({name: tensor for name, tensor in self.state().items() if name not in names})

    def replace(self, tensors):
        self.save({**self.state(), **tensors})

    def prefix(self, place, added):
        """Without `encoder.` the statistics are also missing, but the error must not say so."""
        self.save({re.sub(place, added, name): tensor for name, tensor in self.state().items()})
        (self / "global_cmvn").unlink()

    def without_statistics(self, make=lambda _: None):
        """Remove the statistics, or replace them by those of a file that `make` writes."""
        self.drop(CMVN_MEAN, CMVN_ISTD)
        (self / "global_cmvn").unlink()
        make(self / "global_cmvn")

    def units(self):
        return (self / "units.txt").read_text(encoding="utf-8").splitlines()

    def change_units(self, change):
        self.write("units.txt", "\n".join(change(self.units())) + "\n")
