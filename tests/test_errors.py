import copy
import importlib
import pickle
import re
from pathlib import Path

import pytest

from u2moe import runtime
from u2moe.runtime import AudioOverflowError, QuantizationError, U2moeError

ROOT = Path(__file__).parents[1]
ARGUMENTS = {
    AudioOverflowError: ("0.50 s of audio wait", 0.5),
    QuantizationError: ("more word errors", {"text": {"ctc_greedy": {"wer_after": 0.5}}}),
}
"""Arguments of errors that carry more than a message."""


def errors():
    """Return every class of the tree, including those defined in other modules."""
    for package in ("runtime", "export", "quantize", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            if re.search(r"^class \w+\(.*Error\b", file.read_text(encoding="utf-8"), re.MULTILINE):
                importlib.import_module(".".join(("u2moe", *file.relative_to(ROOT).with_suffix("").parts)))

    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    return sorted(below(U2moeError), key=lambda kind: kind.__name__)


def test_errors_of_the_tree_are_public():
    names = {kind.__name__ for kind in errors() if kind.__module__ == runtime.errors.__name__}
    assert names == {name for name in runtime.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: kind.__name__)
def test_errors_are_pickled_with_all_they_carry(kind):
    """A pool of processes hangs if a worker raises an error that cannot be unpickled."""
    error = kind(*ARGUMENTS.get(kind, ("encoder.onnx: sha256 is 12, expected 34",)))
    error.add_note("in a worker")
    unpickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in (*unpickled, copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
