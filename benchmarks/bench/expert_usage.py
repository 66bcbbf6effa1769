"""Usage of experts in each chunk of real speech: which experts get tokens, and how many bytes their weights take."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.probe import Mode, Samples
from u2moe.benchmarks.instruments.statistics import percentiles, show_progress
from u2moe.quantize.observed import ExpertInputs, RoutedLayer
from u2moe.runtime import Bundle
from u2moe.runtime.model.features import fbank


def measure_experts(bundle: Bundle, recordings: Sequence[Samples], modes: Sequence[Mode]) -> dict[str, Any]:
    """Return a `summary` by mode; {} without experts. With full context, each of `recordings` is one chunk."""
    inputs = ExpertInputs(bundle)
    if not inputs.layers:
        return {}
    result = {}
    for mode in modes:
        show_progress(f"experts: {mode.name}")
        frames = (fbank(samples, bundle.manifest.features) for samples in recordings)
        chunks = (chunk for each in frames for chunk in inputs.chunks(each, mode.chunk_size, mode.num_left_chunks))
        counts = [np.stack([inputs.layers[name].counts(x) for name, x in tokens.items()]) for tokens in chunks]
        if counts:
            result[mode.name] = summary(list(inputs.layers.values()), np.stack(counts))
    return result


def summary(layers: Sequence[RoutedLayer], counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Summarise `counts` [chunks, layers, experts], the numbers of tokens that experts get; see docs/bench.md."""
    touched = counts > 0
    sizes = np.array([layer.expert_bytes for layer in layers])
    load = counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, np.newaxis]
    logs = np.log(load, where=load > 0, out=np.zeros_like(load))
    entropy = -(load * logs).sum(axis=1) / np.log(max(load.shape[1], 2))
    names = [layer.name for layer in layers]
    per_layer = touched.sum(axis=2).mean(axis=0)
    return {
        "num_chunks": len(counts), "num_experts": counts.shape[2], "experts_per_token": layers[0].top_k,
        "touched": {"mean": float(per_layer.mean()), "layers": dict(zip(names, per_layer.tolist(), strict=True))},
        "bytes_touched": percentiles((touched.sum(axis=2) * sizes).sum(axis=1).tolist()),
        "bytes": int(sizes.sum() * counts.shape[2]),
        "load": dict(zip(names, np.round(load, 4).tolist(), strict=True)),
        "load_entropy": {"mean": float(entropy.mean()), "layers": dict(zip(names, entropy.tolist(), strict=True))},
    }  # fmt: skip
