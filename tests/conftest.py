"""Shared fixtures: WeNet's golden files, bundles made from them, and sounds."""

import dataclasses
import functools
import gc
import gzip
import json
import os
import re
import signal
import sys
import types
from pathlib import Path

# Set before PyTorch and numpy are imported, here and in child processes. With more threads than free cores, they mostly
# wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CONFIG_HOME"] = os.devnull  # ignore the user's options
# Background jobs of a shell and their children ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import soundfile
from browsing import opened_pages
from corpora import ToyChoice, write_corpus
from feeding import OPTIONS
from hypothesis import HealthCheck, settings
from packed import read_arrays
from tones import toy_recognizer

from u2moe.runtime import Bundle, BundleWriter, Recognizer, SessionSettings
from u2moe.runtime.corpus.runner import CorpusOptions, run_corpus

# No deadline, because it would measure the load of the machine. Few examples: long searches belong to the benchmarks.
# CI uses the same examples each time; developers' machines search for new ones.
settings.register_profile(
    "u2moe",
    deadline=None,
    max_examples=int(os.environ.get("U2MOE_TEST_EXAMPLES", "40")),  # fewer under sanitizers
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("u2moe")


_ALL_SLOW = re.compile(r"^pytestmark = .*mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path, config):
    """Skip slow test files if slow tests are deselected, because their imports take seconds."""
    is_python = collection_path.suffix == ".py" and "not slow" in config.option.markexpr
    return True if is_python and _ALL_SLOW.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_finish():
    """Collect garbage less often, and not in imported modules: a pause of half a second disturbs servers."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


GOLDEN = Path(__file__).parent / "golden"


class GoldenArrays(dict):
    """Arrays by "utterance/mode/name". Modes that are not stored equal all left chunks or full context."""

    def __missing__(self, key):
        utterance, _, name = key.split("/")
        return self.get(f"{utterance}/stream16_-1/{name}", self[f"{utterance}/full/{name}"])


class Golden:
    """WeNet's results for one checkpoint; see golden/README.md."""

    def __init__(self, name):
        self.path = GOLDEN / name
        self.results = json.loads(gzip.decompress((self.path / "reference.json.gz").read_bytes()))
        self.features = golden_features()
        self.arrays = GoldenArrays(read_arrays(self.path / "reference.npy.xz"))

    def cases(self):
        """Yield utterance, mode ("full" or "stream16_L") and WeNet's results."""
        for utterance, modes in self.results.items():
            for mode, results in modes.items():
                yield utterance, mode, results


@functools.cache
def golden_features():
    """Features of the golden networks' utterances: float32 [frames, 80] by name."""
    return {name: array.astype(np.float32) for name, array in read_arrays(GOLDEN / "utterances.npy.xz").items()}


@pytest.fixture(scope="session")
def utterances():
    return golden_features()


@pytest.fixture(params=["moe_tiny", "dense_tiny"], scope="session")
def golden(request):
    return Golden(request.param)


def write_bundle(directory, target, **model):
    """Export a checkpoint without the comparison with PyTorch, because tests compare the graphs with WeNet. `model`
    replaces fields of the model in the manifest."""
    # Imported here, because tests of the runtime without a bundle do not need PyTorch.
    from u2moe.export.checkpoint import Checkpoint  # noqa: PLC0415
    from u2moe.export.exporter import build_graphs, bundle_manifest  # noqa: PLC0415
    from u2moe.runtime.graph.file import save_graph, with_external  # noqa: PLC0415

    checkpoint = Checkpoint.open(directory)
    manifest = bundle_manifest(checkpoint)
    manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **model))
    with BundleWriter(target) as staging:
        for graph in build_graphs(checkpoint.network(), manifest):
            save_graph(graph, staging.path / f"{graph.graph.name}.onnx")
        staging.add("tokens.txt", "".join(f"{token} {i}\n" for i, token in enumerate(checkpoint.tokens)))
        return staging.finish(with_external(manifest, staging.path)).path


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory):
    """Return a function from the name of a golden network to the folder of its checkpoint, made once per session."""
    from wenet_directories import write_golden  # noqa: PLC0415 - as in `write_bundle`

    return functools.cache(lambda name: write_golden(name, tmp_path_factory.mktemp(name) / "checkpoint"))


@pytest.fixture(scope="session")
def exported(golden_checkpoint, tmp_path_factory):
    """Return a function from the name of a golden network to the folder of its bundle, made once per session."""
    return functools.cache(lambda name: write_bundle(golden_checkpoint(name), tmp_path_factory.mktemp(name) / "bundle"))


@pytest.fixture(scope="session")
def export_quickly():
    """Return `write_bundle`, for tests that make their own checkpoints."""
    return write_bundle


@pytest.fixture
def loaded_networks(monkeypatch):
    """Build layers without random weights, which those of a checkpoint would replace: a third of the time."""
    from torch import nn  # noqa: PLC0415 - as in `write_bundle`

    for layer in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.modules.conv._ConvNd):
        monkeypatch.setattr(layer, "reset_parameters", lambda _: None)


@pytest.fixture(scope="session")
def bundle(exported):
    return Bundle.open(exported("moe_tiny"))


@pytest.fixture(scope="session")
def small_bundle(exported):
    """Return a bundle with fewer layers and experts than moe_tiny, for tests that quantize or measure many layers."""
    return Bundle.open(exported("small"))


OTHERS = ["mfcc", "branchformer", "e_branchformer_moe", "squeezeformer", "efficient_conformer_stream"]


@pytest.fixture(scope="session", params=OTHERS)
def other_bundle(request, tmp_path_factory):
    """Return a bundle with features, caches, frame rates or chunk sizes that the golden networks do not have."""
    from wenet_directories import write_configuration  # noqa: PLC0415 - as in `write_bundle`

    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_configuration(request.param, folder / "checkpoint", blank_bias=4.0)
    return Bundle.open(write_bundle(checkpoint, folder / "bundle"))


@pytest.fixture(scope="session")
def quantized(bundle, tmp_path_factory):
    """Return a function from the name of a recipe to the tiny bundle quantized with it, made once per session."""
    from u2moe.quantize import quantize_bundle, recipe  # noqa: PLC0415 - as in `write_bundle`

    @functools.cache
    def quantize(name):
        return quantize_bundle(bundle.path, tmp_path_factory.mktemp(name) / "bundle", recipe(name))[0]

    return quantize


@pytest.fixture(scope="session")
def ort_bundle(bundle, tmp_path_factory):
    """Return the folder of the tiny bundle with graphs in ORT format."""
    from u2moe.export.profiles.conversion import convert_bundle  # noqa: PLC0415 - as in `write_bundle`

    return convert_bundle(bundle.path, tmp_path_factory.mktemp("ort") / "bundle", "ort").path


@pytest.fixture(scope="session")
def model(bundle):
    return bundle.load()


@pytest.fixture(scope="session")
def recognizer(bundle, model):
    return Recognizer(bundle, model)


@pytest.fixture
def loaded_once(bundle, model, monkeypatch):
    """Let commands use the loaded model of the tiny bundle, unless they ask for other settings."""
    load = Recognizer.load

    def loaded(folder, settings=None, **chosen):
        is_plain = str(folder) == str(bundle.path) and settings == SessionSettings()
        return Recognizer(bundle, model, **chosen) if is_plain else load(folder, settings, **chosen)

    monkeypatch.setattr(Recognizer, "load", loaded)


@pytest.fixture
def own(bundle, model):
    """Return a recogniser of the tiny bundle with short utterances, which a test may break."""
    return Recognizer(bundle, model, OPTIONS)


@pytest.fixture
def toy():
    """Return a recogniser of tones; see toys/tones.py."""
    return toy_recognizer()


@pytest.fixture(scope="session")
def blocks(sound):
    """Return the sound in buffers of 100 ms."""
    return np.array_split(sound, 40)


@pytest.fixture(scope="session")
def sound():
    """Return four seconds of modulated noise at 16 kHz, in which the tiny models find some tokens."""
    noise = np.random.default_rng(0).standard_normal(64_000)
    return (noise * np.abs(np.sin(np.arange(64_000) / 3000)) * 0.2).astype(np.float32)


@pytest.fixture(scope="session")
def talk(sound, tmp_path_factory):
    """Return a recording so long that the third endpoint rule cuts it within speech."""
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, np.tile(sound, 6)[: 22 * 16_000], 16_000, subtype="PCM_16")
    return file


@pytest.fixture
def clips(tmp_path, sound):
    """Return a folder with two recordings, a.wav and b.wav."""
    for name, samples in (("a", sound), ("b", sound[::-1])):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
    return tmp_path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return a data.list of ten utterances of tones."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 10)


@pytest.fixture(scope="session")
def undisturbed(corpus, tmp_path_factory):
    """Return the results folder of a run over `corpus`."""
    output = tmp_path_factory.mktemp("undisturbed")
    run_corpus(corpus, output, ToyChoice(), CorpusOptions(block_size=4, num_workers=2))
    return output


@pytest.fixture(scope="session")
def session_of():
    """Return the function of toys/layers.py, which needs onnx."""
    import layers  # noqa: PLC0415 - as in `write_bundle`

    return layers.session_of


class FakeSounddevice(types.ModuleType):
    """Replacement of sounddevice: a loudspeaker, and a microphone that records what a test plays. Like PortAudio, it
    reuses its buffer, and ends the stream when the callback raises CallbackStop."""

    class PortAudioError(Exception):
        pass

    class CallbackStop(Exception):  # noqa: N818
        pass

    def __init__(self):
        super().__init__("sounddevice")
        self.rates = [16_000, 48_000]
        self.devices = [
            {"index": 0, "name": "Loudspeaker", "max_input_channels": 0, "default_samplerate": 44_100.0},
            {"index": 1, "name": "Headset", "max_input_channels": 1, "default_samplerate": 48_000.0},
        ]
        self.stream = None
        self.on_start = lambda: None

    def query_devices(self, device=None, kind=None):
        if kind is None:
            return self.devices
        found = [item for item in self.devices if item["max_input_channels"] and device in (None, item["index"])]
        if not found:
            raise ValueError(f"No input device matching {device!r}")
        return found[0]

    def check_input_settings(self, device, channels, dtype, samplerate):
        self.query_devices(device, "input")
        if samplerate not in self.rates:
            raise self.PortAudioError("Invalid sample rate")

    def InputStream(self, **settings):  # noqa: N802
        self.check_input_settings(*(settings[name] for name in ("device", "channels", "dtype", "samplerate")))
        self.settings = settings
        self.stream = types.SimpleNamespace(active=False, start=self._start, stop=self.end, close=lambda: None)
        return self.stream

    def _start(self):
        self.stream.active = True
        self.on_start()

    def play(self, samples, *, input_overflow=False):
        size = self.settings["blocksize"]
        for start in range(0, len(samples), size):
            if not self.stream.active:
                return
            block = samples[start : start + size].reshape(-1, 1).copy()
            try:
                status = types.SimpleNamespace(input_overflow=input_overflow)
                self.settings["callback"](block, len(block), None, status)
            except self.CallbackStop:
                self.end()
            block[:] = np.nan

    def end(self):
        if self.stream.active:
            self.stream.active = False
            self.settings["finished_callback"]()


@pytest.fixture
def sounddevice(monkeypatch):
    module = FakeSounddevice()
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


@pytest.fixture
def new_page(browser):
    """Open pages in the `browser` fixture of the module, which sets the microphone's input; see `opened_pages`."""
    with opened_pages(browser) as open_page:
        yield open_page
