"""Random checkpoints of the configurations that golden/configurations lists."""

from pathlib import Path

import yaml

from u2moe.export.random_checkpoint import old_layout, random_config, write_random_checkpoint

FOLDER = Path(__file__).parents[1] / "golden" / "configurations"
CONFIGURATIONS = yaml.safe_load((FOLDER / "configurations.yaml").read_text(encoding="utf-8"))


def write_configuration(name, folder, **defaults):
    """Write the checkpoint of one configuration; `defaults` are arguments of `random_config`. Returns its folder."""
    arguments = {**defaults, **CONFIGURATIONS[name]}
    old = arguments.pop("old_layout", False)
    config = random_config(**arguments)
    write_random_checkpoint(folder, old_layout(config) if old else config, seed=1)
    return folder
