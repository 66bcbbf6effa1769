"""Releases a WeNet directory as the demo model, with its measurements and pages.

    python release.py checkpoint-new

It takes about 12 minutes on one core. To resume after an interruption, name the remaining steps after the checkpoint.
Numbers that need a quiet machine come from `u2moe bench` and the scripts in `benchmarks/`; `measurements.py` lists the
missing ones.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
from measurements import drop

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEMO = ROOT / "runtime" / "demo"
DEV = "dev/queen-dev.tsv"
"""List of recordings for calibration. Other recordings are not used for any decision."""
PADDING_S = 0.18
"""Seconds of silence around recordings that are cut at a sound: three encoder frames; see the README."""
LANGUAGE_MODEL = f"{DEMO / 'language.lm'},weight=0.3,word_bonus=2,unknown_score=-10,rescoring_weight=1"
BEAM_SIZE = 40
"""Language model, with the beam size and the weights that make the fewest errors on queen-dev."""
STEPS = ("bundle", "install", "results", "quantization", "pages")


def call(*words: str | Path, cwd: Path = HERE) -> None:
    """Run Python with these arguments and show its output."""
    subprocess.run([sys.executable, *map(str, words)], cwd=cwd, check=True)


class Release:
    """Release of one checkpoint. Each step is a method."""

    def __init__(self, source: Path, work_dir: Path, processes: int) -> None:
        self.source, self.work_dir, self.processes = source, work_dir, processes
        self.folder = work_dir / "release"
        self.float32, self.int8 = self.folder / "float32", self.folder / "int8"
        self.dev = work_dir / DEV

    def bundle(self) -> None:
        """Export, quantize, and calibrate confidences."""
        call("-m", "u2moe", "export", self.source, self.float32, "--padding", str(PADDING_S), "--overwrite")
        call("-m", "u2moe", "lm", "attach", self.float32, LANGUAGE_MODEL, "--beam-size", str(BEAM_SIZE))
        call("-m", "u2moe", "quantize", self.float32, self.int8, "--no-report", "--overwrite")
        call("-m", "u2moe.benchmarks.studies.calibration", self.int8, self.dev, "--fit")

    def install(self) -> None:
        """Install checkpoint and bundle."""
        shutil.copytree(self.source, HERE / "checkpoint", dirs_exist_ok=True)
        checkpoints.pack(HERE / "checkpoint")
        shutil.copytree(self.int8, DEMO, dirs_exist_ok=True)
        drop()

    def results(self) -> None:
        """Measure word error rates and the choices of experts."""
        bundles, options = (f"float32={self.float32}", f"int8={self.int8}"), ("--work-dir", self.work_dir)
        call("evaluate.py", *bundles, "--every-mode", "int8", *options, "--processes", str(self.processes))
        call("experts.py", "--checkpoint", self.source, *options)
        call("specialists.py", "--checkpoint", self.source, *options)

    def quantization(self) -> None:
        """Make 4-bit bundles for the study of formats. They are not calibrated on recordings of that study."""
        calibrate = ("--calibrate", self.dev)
        recipes: dict[str, tuple[str | Path, ...]] = {
            "int4": ("int4-experts",),
            "calibrated": ("int4-experts", *calibrate),
            "all": ("int4", *calibrate),
            "pointwise": ("int4", "--group", "pointwise_convolutions=int8", *calibrate),
            "smallest": ("int4", "--group", "output_layers=int4", *calibrate),
        }
        for name, recipe in recipes.items():
            out = self.folder / name
            call("-m", "u2moe", "quantize", self.float32, out, "--recipe", *recipe, "--no-report", "--overwrite")

    def pages(self) -> None:
        """Update tables and pictures of the documentation."""
        call("publish.py")
        call("-m", "u2moe.benchmarks.results.pages", cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="WeNet directory, as wenet.py writes it")
    parser.add_argument("steps", nargs="*", default=STEPS, metavar="STEP", help=f"{', '.join(STEPS)} (default: all)")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if unknown := {*args.steps} - {*STEPS}:
        parser.error(f"steps must be in {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    release = Release(args.checkpoint.resolve(), args.work_dir.resolve(), args.processes)
    for step in args.steps:
        print(f"- {step}", flush=True)
        getattr(release, step)()


if __name__ == "__main__":
    main()
