"""What is measured of the demo model in `benchmarks/results`, by which commands, and what is still of an earlier model.

    python measurements.py

TESTS are the lists of recordings in `exp/test`, WORDS, HELDOUT and QUEEN single ones of them; INT8, INT4, CALIBRATED
and FLOAT32 the bundles in `exp/release`, LM models that `language_model.py` makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from u2moe.benchmarks.results.files import read_json

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "benchmarks" / "results"
EARLIER = HERE / "results" / "earlier.json"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How a file of results is made.

    Attributes:
        command: after `python -m u2moe.benchmarks.`, or a whole command.
        minutes: about, on two idle cores.
        quiet: whether it measures time, for which nothing else may run.
        changes: what a new model changes in it.
    """

    command: str
    minutes: int
    quiet: bool
    changes: str


MEASUREMENTS = {
    "calibration": Measurement(
        command="quality.calibration INT8 TESTS --output FILE",
        minutes=2, quiet=False, changes="all",
    ),
    "formats": Measurement(
        command="quality.formats int8=INT8 int4=INT4 'int4, calibrated=CALIBRATED' --manifest TESTS --results FILE",
        minutes=13, quiet=False, changes="all; needs the bundles of release.py",
    ),
    "hotwords": Measurement(
        command="quality.hotwords INT8 TESTS --output FILE",
        minutes=5, quiet=False, changes="all",
    ),
    "word_times": Measurement(
        command="quality.word_times INT8 --isolated WORDS --sentences HELDOUT --output FILE",
        minutes=2, quiet=False, changes="all; needs festival",
    ),
    "language_models": Measurement(
        command="quality.language_models INT8 --sets TESTS --model NAME LM TEXT DEV --output FILE",
        minutes=15, quiet=False, changes="all; needs the models of language_model.py",
    ),
    "kernels": Measurement(
        command="quality.kernels TESTS --results FILE",
        minutes=3, quiet=False, changes="all; needs native kernels",
    ),
    "runtimes": Measurement(
        command="runtimes.equality --bundle int8=INT8 --bundle float32=FLOAT32 --cpp PROGRAM --output FILE",
        minutes=15, quiet=False, changes="all; needs Node, Chromium, C++, qemu",
    ),
    "first_difference": Measurement(
        command="runtimes.first_difference INT8 AUDIO --elsewhere NAME=COMMAND --output FILE",
        minutes=10, quiet=False, changes="all; needs Node, qemu",
    ),
    "processors": Measurement(
        command="quality.processors --bundle NAME=FOLDER --processor NAME=COMMAND --output FILE",
        minutes=120, quiet=False, changes="all; needs qemu",
    ),
    "bench": Measurement(
        command="u2moe bench --json FILE --plots docs/results/bench",
        minutes=3, quiet=True, changes="all",
    ),
    "first_chunk": Measurement(
        command="bench.first_chunk --output FILE",
        minutes=1, quiet=True, changes="all",
    ),
    "language_model_cost": Measurement(
        command="quality.language_model_cost INT8 QUEEN --model LM --output FILE",
        minutes=5, quiet=True, changes="all",
    ),
    "runtimes_speed": Measurement(
        command="runtimes.speed --cpp PROGRAM --output FILE",
        minutes=10, quiet=True, changes="all; needs Node, Chromium, C++",
    ),
    "systems": Measurement(
        command="peers.systems WORK --peers u2moe u2moe-whole",
        minutes=1, quiet=True, changes="the rows of u2moe",
    ),
    "sherpa": Measurement(
        command="peers.sherpa WORK --only demo/",
        minutes=1, quiet=True, changes="the demo's rows",
    ),
    "providers": Measurement(
        command="runtimes.providers --provider NAME --bundle int8=INT8 --output FILE",
        minutes=10, quiet=True, changes="all; needs several packages of onnxruntime",
    ),
    "full_size": Measurement(
        command="full_size.measure WORK",
        minutes=15, quiet=True, changes="what is routed as the demo model; needs 25 GB",
    ),
    "serving": Measurement(
        command="serving.load WORK --cores 0",
        minutes=60, quiet=True, changes="the demo's rows",
    ),
    "corpora": Measurement(
        command="peers.corpora WORK --output FILE",
        minutes=15, quiet=True, changes="our rows",
    ),
    "soak": Measurement(
        command="endurance.soak INT8 TESTS --output FILE",
        minutes=60, quiet=True, changes="all",
    ),
    "long_video": Measurement(
        command="endurance.long_video --output FILE",
        minutes=10, quiet=False, changes="words that are recognised",
    ),
}  # fmt: skip
"""In the order in which they are best made. Others in the folder are of the code, or of other models."""


def digests() -> dict[str, str]:
    """The sha256 of each file of results."""
    return {name: sha256((FOLDER / f"{name}.json").read_bytes()).hexdigest() for name in MEASUREMENTS}


def earlier() -> list[str]:
    """Results that were already there when the model that ships was installed (see `release.py`)."""
    then, now = read_json(EARLIER), digests()
    return [name for name in MEASUREMENTS if then.get(name) == now[name]]


def lines() -> Iterator[str]:
    """What is to be measured again, and how."""
    for name in earlier():
        own = MEASUREMENTS[name]
        module = "" if own.command.startswith("u2moe") else "python -m u2moe.benchmarks."
        quiet = "quiet, " * own.quiet
        command = own.command.replace("FILE", f"benchmarks/results/{name}.json")
        yield f"{name}: {quiet}{own.minutes} min, changes {own.changes}\n    {module}{command}"


if __name__ == "__main__":
    print("\n".join(lines()) or "all results are of the model that ships")
