"""From a WeNet directory to the demo model that ships, with all that is said of it: one command that can be repeated.

    python release.py checkpoint-new

What is done is not done again before something that it depends on has changed. Numbers that need a quiet machine are
made by `u2moe bench` and the scripts in `benchmarks/`: `measurements.py` names what is missing.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measurements import drop
from stages import Stage, run, run_together

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
DEMO = ROOT / "runtime" / "demo"
CALIBRATION_SETS = ("dev/queen-dev.tsv", "test/heldout.tsv")
"""Nothing is chosen on the other sets."""
PADDING_S = 0.18
"""Three encoder frames; see the README."""


def call(*words: str | Path, cwd: Path = HERE) -> None:
    """Runs Python with these arguments; what it prints is seen."""
    subprocess.run([sys.executable, *map(str, words)], cwd=cwd, check=True)


def code(package: str) -> list[Path]:
    """The files of a package of ours."""
    return sorted((ROOT / package).rglob("*.py"))


def joined(manifests: list[Path], file: Path) -> Path:
    """Several lists of recordings as one, with absolute paths."""
    lines = [
        f"{manifest.parent.resolve()}/{line}\n"
        for manifest in manifests
        for line in manifest.read_text(encoding="utf-8").splitlines()
    ]
    file.write_text("".join(lines), encoding="utf-8")
    return file


class Release:
    """The stages for one checkpoint."""

    def __init__(self, source: Path, work_dir: Path, processes: int) -> None:
        self.source, self.work_dir, self.processes = source, work_dir, processes
        self.folder = work_dir / "release"
        self.float32, self.int8 = self.folder / "float32", self.folder / "int8"
        self.tests = sorted((work_dir / "test").glob("*.tsv"))
        self.dev = [work_dir / name for name in CALIBRATION_SETS]

    def bundle(self) -> Iterator[Stage]:
        """What ships, one stage after the other."""

        def export() -> None:
            call("-m", "u2moe", "export", self.source, self.float32, "--padding", str(PADDING_S), "--overwrite")

        def quantize() -> None:
            call("-m", "u2moe", "quantize", self.float32, self.int8, "--no-report", "--overwrite")
            call("-m", "u2moe.benchmarks.studies.calibration", self.int8, *self.dev, "--fit")

        def install() -> None:
            shutil.copytree(self.source, HERE / "checkpoint", dirs_exist_ok=True)
            shutil.copytree(self.int8, DEMO, dirs_exist_ok=True)
            drop()

        reads = [self.source, *code("export")]
        yield Stage(name="export", work=export, reads=reads, makes=[self.float32])
        reads = [self.float32, *self.dev, *code("quantize")]
        yield Stage(name="quantize", work=quantize, reads=reads, makes=[self.int8])
        installed = [DEMO / file.name for file in sorted(self.int8.iterdir())]
        installed += [HERE / "checkpoint" / file.name for file in sorted(self.source.iterdir())]
        yield Stage(name="install", work=install, reads=[self.source, self.int8], makes=installed)

    def results(self) -> Iterator[Stage]:
        """What is counted of it, in any order."""
        options = ("--work-dir", self.work_dir)

        def evaluate() -> None:
            bundles = (f"float32={self.float32}", f"int8={self.int8}")
            call("evaluate.py", *bundles, "--every-mode", "int8", *options, "--processes", str(self.processes))

        def experts() -> None:
            call("experts.py", "--checkpoint", self.source, *options)
            call("specialists.py", "--checkpoint", self.source, *options)

        reads = [self.float32, self.int8, *self.tests, *self.dev, HERE / "evaluate.py"]
        yield Stage(name="evaluate", work=evaluate, reads=reads, makes=[RESULTS / "wer.json"])
        reads = [self.source, *self.tests, HERE / "experts.py", HERE / "specialists.py"]
        made = [RESULTS / "experts.json", RESULTS / "specialists.json"]
        yield Stage(name="experts", work=experts, reads=reads, makes=made)

    def quantization(self) -> Stage:
        """What it costs to quantize: words, and time, for which nothing else may run."""
        reports = [RESULTS / f"quantization{name}.json" for name in ("", "-int4", "-int4-calibrated")]
        options = ("--work-dir", self.work_dir)

        def report() -> None:
            manifest = joined(self.dev, self.folder / "dev.tsv")
            call("calibration.py", self.folder / "calibration", *options)
            calibrate = ("--calibrate", self.folder / "calibration" / "calibration.tsv")
            kinds: list[tuple[str | Path, ...]] = [("int8",), ("int4-experts",), ("int4-experts", *calibrate)]
            for kind, file in zip(kinds, reports, strict=True):
                words = ("--recipe", *kind, "--list", manifest, "--overwrite")
                out = self.folder / f"{file.stem}-reported"
                call("-m", "u2moe", "quantize", self.float32, out, *words)
                shutil.copy(out / "report.json", file)

        reads = [self.float32, *self.dev, *code("quantize"), HERE / "calibration.py"]
        return Stage(name="quantization", work=report, reads=reads, makes=reports)

    def pages(self) -> Stage:
        """What is said of it."""

        def publish() -> None:
            call("publish.py")
            call("-m", "u2moe.benchmarks.results.pages", cwd=ROOT)

        names = ("demo.md", "recognise.md", "quantize.md", "wer.png", "training.png", "specialists.png")
        makes = [ROOT / "docs" / name for name in names]
        return Stage(name="pages", work=publish, reads=[RESULTS, HERE / "publish.py", HERE / "run"], makes=makes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="WeNet directory, as wenet.py writes it")
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    release = Release(args.checkpoint.resolve(), args.work_dir.resolve(), args.processes)
    records = release.folder / "done"

    def show(line: str) -> None:
        print(f"- {line}", flush=True)

    for stage in release.bundle():
        run(stage, records, show)
    run_together(release.results(), records, show)
    run(release.quantization(), records, show)
    run(release.pages(), records, show)


if __name__ == "__main__":
    main()
