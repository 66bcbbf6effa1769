"""Bundles with changed graphs, and recordings of noise, for tests of quantization."""

import numpy as np
import onnx_ir as ir
import soundfile

from u2moe.runtime import BundleWriter
from u2moe.runtime.graph.external import with_external
from u2moe.runtime.graph.file import save_graph


def changed_bundle(bundle, folder, change):
    """A bundle with each graph changed by a function."""
    with BundleWriter(folder) as staging:
        for graph in bundle.manifest.model.graphs():
            model = ir.load(bundle.path / graph.file)
            change(model)
            save_graph(model, staging.path / graph.file)
        staging.add("tokens.txt", bundle.path / "tokens.txt")
        return staging.finish(with_external(bundle.manifest, staging.path))


def write_noise(folder, number, length):
    """Recordings of noise that rises and falls at another rate in each; returns the folder."""
    for index in range(number):
        noise = np.random.default_rng(index).standard_normal(length)
        samples = noise * np.abs(np.sin(np.arange(length) / (1000 + 900 * index))) * 0.2
        soundfile.write(folder / f"{index}.wav", samples.astype(np.float32), 16_000)
    return folder
