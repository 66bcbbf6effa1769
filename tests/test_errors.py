import copy
import importlib
import pickle
import pkgutil

import pytest

import u2moe.benchmarks
import u2moe.export
import u2moe.quantize
import u2moe.runtime
from u2moe.runtime import AudioOverflowError, QuantizationError, U2moeError
from u2moe.runtime import errors as tree

ARGUMENTS = {
    AudioOverflowError: ("0.50 s of audio wait", 0.5),
    QuantizationError: ("more word errors", {"text": {"ctc_greedy": {"wer_after": 0.5}}}),
}
"""Arguments of errors that carry more than a message."""


def import_with_extras(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # of an extra; CI installs all
        if error.name not in ("av", "pyarrow", "ray"):
            raise


def errors():
    """Return every class of the tree, including those defined in other modules."""
    for package in (u2moe.runtime, u2moe.export, u2moe.quantize, u2moe.benchmarks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                import_with_extras(module.name)

    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    return sorted(below(U2moeError), key=lambda kind: kind.__name__)


def test_errors_of_the_tree_are_public():
    names = {kind.__name__ for kind in errors() if kind.__module__ == tree.__name__}
    assert names == {name for name in u2moe.runtime.__all__ if name.endswith("Error")}


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
