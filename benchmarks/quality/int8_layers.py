"""Which layers of an encoder should stay in int8 where experts are in int4? The error of its output, choice by choice.

    python -m u2moe.benchmarks.quality.int8_layers FLOAT32 --manifest SET.tsv ... [--results FILE]

FLOAT32 is the folder of a float32 bundle; manifests are lines of "path TAB transcript". Only the experts of the encoder
are quantized, each weight by itself, and nothing else.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.config import recipe
from u2moe.quantize.experts.layer import ExpertLayer, expert_layers
from u2moe.quantize.passes.experts import QuantizeExperts, num_last
from u2moe.quantize.report import Array, features_of, output_errors
from u2moe.quantize.routing import ExpertInputs, scope
from u2moe.quantize.tuning.choice import layers_alone
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.bundle.writer import BundleWriter
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.text.word_errors import read_manifest

SHARES = (0.25, 0.375, 0.5)
MOST_FRAMES = 60_000
"""Feature frames that are heard: ten minutes."""
OWN_TOKENS = 4000
"""Tokens from which a layer's own error is found."""
INT4 = recipe("fp32", {"experts": "int4"})
CHOICES = {
    "first": "the first",
    "even": "evenly spread",
    "own": "those whose own output has the largest error",
    "last": "the last",
}


class Chosen(QuantizeExperts):
    """Experts in int4, but for the layers of these names."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__("int4", INT4)
        self.names = names

    def formats(self, layers: Sequence[ExpertLayer]) -> list[str]:
        """The format of each layer."""
        return ["int8" if scope(layer.node) in self.names else "int4" for layer in layers]


def measure(
    source: Bundle, features: Sequence[Array], progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Errors of the encoder's output.

    Args:
        source: a float32 bundle whose encoder has experts.
        features: features of speech, float32 [frames, mel] each.
        progress: called with a line for each choice.

    Returns:
        layers: names, in order; own: relative error of each layer's own output in int4; int4, int8: `output_errors`
        with all layers in that format; choices: for each of `CHOICES` and each share, those with so many in int8.
    """
    layers = expert_layers(ir.load(source.path / source.manifest.model.graphs()[0].file))
    names = [scope(layer.node) for layer in layers]
    reference = source.load()

    def errors(chosen: Collection[str]) -> dict[str, float]:
        progress(f"{len(chosen)} layers in int8")
        with tempfile.TemporaryDirectory() as folder:
            return output_errors(reference, _variant(source, chosen, Path(folder) / "bundle"), features)

    own = _own_errors(source, features, progress)
    found: dict[str, Any] = {"layers": names, "own": own, "int4": errors(()), "int8": errors(names), "choices": {}}
    for name in CHOICES:
        chosen = {share: _chosen(name, names, own, num_last(layers, share)) for share in SHARES}
        found["choices"][name] = {f"{share:g}": errors(own_names) for share, own_names in chosen.items()}
    return found


def _chosen(name: str, names: Sequence[str], own: Mapping[str, float], count: int) -> Sequence[str]:
    """So many layers by one of `CHOICES`."""
    if name == "own":
        return sorted(names, key=lambda layer: own[layer])[-count:]
    if name == "even":
        return [names[index] for index in np.linspace(0, len(names) - 1, count).astype(int)]
    return names[:count] if name == "first" else names[-count:]


def _variant(source: Bundle, chosen: Collection[str], folder: Path) -> Model:
    """The model with the encoder's experts in int4, but for some layers."""
    with BundleWriter(folder) as staging:
        for name in source.manifest.files:
            staging.add(name, source.path / name)
        encoder = source.manifest.model.graphs()[0].file
        model = ir.load(source.path / encoder)
        Chosen(chosen)(model)
        RemoveUnusedNodesPass()(model)  # float32 weights, too
        for file in staging.path.glob(f"{encoder}*"):
            file.unlink()
        save_graph(model, staging.path / encoder)
        return staging.finish(dataclasses.replace(source.manifest, quantization={"recipe": INT4.name})).load()


def _own_errors(source: Bundle, features: Sequence[Array], progress: Callable[[str], None]) -> dict[str, float]:
    """Relative error of the output of each layer alone in int4, for the tokens that it gets in float32."""
    progress("errors of each layer alone")
    inputs, heard = ExpertInputs(source), []
    for frames in features:
        heard.append(inputs.tokens(frames))
        if sum(len(next(iter(own.values()))) for own in heard) >= OWN_TOKENS:
            break
    model = ir.load(source.path / source.manifest.model.graphs()[0].file)
    found = {}
    for index, name in enumerate(inputs.layers):
        x = np.concatenate([own[name] for own in heard])[np.newaxis]
        outputs = []
        for kind in ("fp32", "int4"):
            alone = layers_alone(model, [index])
            if kind == "int4":
                Chosen(())(alone)
            ir.external_data.load_to_model(alone)
            outputs.append(_run(alone, x))
        found[name] = relative_error(*outputs)
    return found


def _run(model: ir.Model, x: Array) -> Array:
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, SessionSettings().session_options(), providers=[DEFAULT_PROVIDER])
    return np.asarray(session.run(["y0"], {"x0": x})[0])


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: errors by choice and share."""
    rows = [
        (CHOICES[name], *(f"{errors['encoder_relative']:.1%}" for errors in by_share.values()))
        for name, by_share in results["choices"].items()
    ]
    header = ("layers in int8", *(f"{share:.1%}" for share in SHARES))
    counts = {kind: f"{results[kind]['encoder_relative']:.1%}" for kind in ("int4", "int8")}
    return {"table": table(header, rows), **counts, "frames": str(results["int4"]["frames"])}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("quality.int8_layers", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a float32 bundle")
    parser.add_argument("--manifest", nargs="+", type=Path, required=True, help="lines of path<TAB>transcript")
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    args = parser.parse_args(arguments)
    source = Bundle.open(args.bundle)
    files = [recording.path for manifest in args.manifest for recording in read_manifest(manifest)]
    features = features_of(source, files, limit=MOST_FRAMES)
    publish(args.bundle, measure(source, features, report), values, args.results)


if __name__ == "__main__":
    run_script(main)
