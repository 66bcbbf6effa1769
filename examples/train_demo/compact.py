"""Writes the compact form of a run's last checkpoint, with everything needed without its work directory."""

import argparse
import shutil
from pathlib import Path

import checkpoints
from reports import LOGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--name", default="dense", help="folder of the run, inside the work directory")
    parser.add_argument("--model", type=Path, help="WeNet directory made of this checkpoint: its weights are left out")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("run"))
    args = parser.parse_args()
    folder = args.work_dir / args.name
    args.output.mkdir(parents=True, exist_ok=True)
    for path in (*(folder / name for name in LOGS), *(args.work_dir / name for name in ("units.txt", "bpe.model"))):
        if path.exists():
            shutil.copyfile(path, args.output / path.name)
    path = args.output / f"{args.name}.pt"
    checkpoints.save_compact(checkpoints.load(checkpoints.all_of(folder)[-1]), path, args.model)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
