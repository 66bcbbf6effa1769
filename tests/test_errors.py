import contextlib
import copy
import importlib
import multiprocessing
import pickle
import pkgutil

import pytest
from worker_processes import fail

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


@contextlib.contextmanager
def suppress_missing_extra():
    """Skip modules that need a missing extra. They define no errors. CI installs all extras."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("av", "pyarrow", "ray"):
            raise


def errors():
    """Return every class of the tree, including those defined in other modules."""
    for package in (u2moe.runtime, u2moe.export, u2moe.quantize, u2moe.benchmarks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                with suppress_missing_extra():
                    importlib.import_module(module.name)

    def below(kind):
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    return sorted(below(U2moeError), key=lambda kind: kind.__name__)


def test_the_tree_is_all_there_is_and_comes_out_of_worker_processes():
    names = {kind.__name__ for kind in errors() if kind.__module__ == tree.__name__}
    assert names == {name for name in u2moe.runtime.__all__ if name.endswith("Error")}
    # A process pool hangs if its worker raises an error that cannot be unpickled
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for kind, arguments in ARGUMENTS.items():
            with pytest.raises(kind, match=arguments[0]):
                pool.apply_async(fail, (kind, arguments)).get(timeout=120)


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_are_pickled_with_all_they_carry(kind, protocol):
    error = kind(*ARGUMENTS.get(kind, ("encoder.onnx: sha256 is 12, expected 34",)))
    error.add_note("in a worker")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
