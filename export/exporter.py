"""Exports a checkpoint directory to a verified bundle: builds and writes the graphs, then compares them with torch."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version

import onnx_ir as ir

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.comparison import ParityReport
from u2moe.export.encoders.kinds import KINDS
from u2moe.export.layers import linear
from u2moe.export.model import DecoderNodes, SpeechModel
from u2moe.export.parity import Parity
from u2moe.export.proofs import check_proved
from u2moe.export.random_checkpoint import random_source, spread_routers
from u2moe.export.weights import AdapterUse
from u2moe.runtime.bundle.manifest import TOKENS_FILE, Manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.builder import GraphBuilder, build_model
from u2moe.runtime.graph.features import features_graph
from u2moe.runtime.graph.file import save_graph, with_external
from u2moe.runtime.validation import first_difference


def export_bundle(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str | None = None,
    units: str | None = None,
    lora: AdapterUse | None = None,
    padding_s: float = 0.0,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, ParityReport]:
    """Export the WeNet checkpoint in `checkpoint` to a bundle in `out`.

    Args:
        checkpoint: directory with train.yaml, units.txt and the weights.
        out: folder to write; left unchanged on failure.
        weights: the state dict, as the name of a file in the directory or as a path; default: final.pt.
        units: the vocabulary, as a name or a path; default: the file named in train.yaml, or units.txt.
        lora: "add" to add the LoRA adapters in the state dict to its weights, "contained" if the weights already
            contain them; default: decided by the name of the weights file.
        padding_s: the bundle's default for `DecodingOptions.padding_s`, in seconds.
        overwrite: replace an existing bundle.
        progress: called with a line for each step.

    Raises:
        ValueError: `padding_s` is out of range.
        CheckpointError: the checkpoint cannot be read.
        UnsupportedError: this kind of checkpoint is not supported, or was never compared with WeNet.
        ParityError: a graph differs from torch.
        BundleError: `out` cannot be written.
    """
    with BundleWriter(out, overwrite=overwrite) as staging:
        progress(f"reading {checkpoint}")
        opened = Checkpoint.open(checkpoint, weights, units, lora)
        check_proved(opened.path, opened.architecture)
        progress(f"read {opened.weights}: {len(opened.tensors)} tensors, {len(opened.ignored)} ignored")
        features = opened.features
        kind = f"{features.num_ceps} cepstra of " if features.num_ceps else ""
        progress(f"features: {kind}{features.num_mel_bins} mel bins of audio at {features.sample_rate} Hz")
        network, manifest = opened.network(), bundle_manifest(opened)
        manifest = dataclasses.replace(manifest, decoding=dataclasses.replace(manifest.decoding, padding_s=padding_s))
        manifest = _write(opened, network, manifest, staging, progress)
        report = Parity(network, staging.path, manifest, subject=opened.weights).run(progress)
        return staging.finish(manifest), report


def export_random(
    config_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    change: Callable[[SpeechModel], None] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Write a bundle with seeded random weights, to measure the cost of the network that a train.yaml describes.

    Nothing is compared with torch, since nothing was trained. Routers spread tokens evenly. The bundle and its results
    state that they are for measuring only.

    Args:
        config_file: a train.yaml (from a recipe or from training), or its folder.
        out: folder to write; left unchanged on failure.
        vocab_size: number of tokens; None: as in the file, or 5000 if it states none.
        seed: the same seed yields the same weights.
        change: a function that changes layers of the network, for networks that no train.yaml describes.
        overwrite: replace an existing bundle.
        progress: called with a line for each step.

    Raises:
        CheckpointError: the file cannot be read, or contradicts itself or `vocab_size`.
        UnsupportedError: this kind of network is not supported.
        BundleError: `out` cannot be written.
    """
    source = random_source(config_file, vocab_size=vocab_size, seed=seed)
    with BundleWriter(out, overwrite=overwrite) as staging:
        network = source.network()
        if change is not None:
            change(network)
        progress("spreading tokens over experts")
        spread_routers(network, seed)
        manifest = dataclasses.replace(bundle_manifest(source), random_weights=True)
        return staging.finish(_write(source, network, manifest, staging, progress))


def _write(
    source: Checkpoint, network: SpeechModel, manifest: Manifest, staging: BundleWriter, progress: Callable[[str], None]
) -> Manifest:
    """Write all files of the bundle and seal them. Return the manifest with the external weights added."""
    num_graphs = len(manifest.model.graphs()) + 1  # including the feature graph
    for number, model in enumerate(build_graphs(network, manifest), start=1):
        progress(f"[{number}/{num_graphs}] writing {model.graph.name}.onnx")
        save_graph(model, staging.path / f"{model.graph.name}.onnx", progress=progress)
    staging.add(TOKENS_FILE, "".join(f"{token} {index}\n" for index, token in enumerate(source.tokens)))
    manifest = with_external(manifest, staging.path)
    staging.seal(manifest)
    return manifest


def validate_bundle(
    bundle: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    weights: str | None = None,
    units: str | None = None,
    lora: AdapterUse | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compare an existing float32 bundle with the checkpoint that it was exported from.

    Raises:
        BundleError: the bundle is damaged, quantized, or from another checkpoint.
        CheckpointError: the checkpoint cannot be read.
        ParityError: a graph differs from torch.
    """
    opened = Bundle.open(bundle)
    source = Checkpoint.open(checkpoint, weights, units, lora)
    if opened.manifest.quantization:
        raise BundleError(f"{opened.path}: is quantized; only float32 bundles can be compared with torch")
    expected = bundle_manifest(source)
    for section in ("model", "features", "text"):
        found, wanted = getattr(opened.manifest, section), getattr(expected, section)
        if found != wanted:
            field, found, wanted = first_difference(found, wanted, section)
            raise BundleError(f"{opened.path}: {field} is {found}, but the checkpoint has {wanted}")
    if opened.tokens != source.tokens:
        raise BundleError(f"{opened.path / TOKENS_FILE}: differs from the vocabulary of {source.path}")
    return Parity(source.network(), opened.path, opened.manifest, subject=opened.path).run(progress)


def bundle_manifest(checkpoint: Checkpoint) -> Manifest:
    """Return the manifest for a bundle of this checkpoint, with `files` still empty."""
    return Manifest(
        model=checkpoint.model_config(),
        features=checkpoint.features,
        text=checkpoint.text,
        decoding=checkpoint.decoding,
        producer=f"u2moe {version('u2moe')}",
        files={},
        architecture=dataclasses.asdict(checkpoint.architecture),
    )


def build_graphs(network: SpeechModel, manifest: Manifest) -> Iterator[ir.Model]:
    """Yield the graphs of a bundle, one at a time; the weights of a graph are read when it is saved."""
    # Not traced: that would fix each expert's number of tokens, and leave names, shared values and axes to the tracer.
    config, metadata = manifest.model, manifest.metadata()

    def encoder(g: GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        return KINDS[network.config.encoder.kind].nodes(g, network.encoder, inputs, config.max_position).build()

    def ctc(g: GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        with g.scope("ctc", group="output_layers"):
            logits = linear(g, inputs["encoder_out"], network.ctc.ctc_lo, "ctc_lo")
            return {"log_probs": g.op("LogSoftmax", logits, axis=-1)}

    yield features_graph(manifest)
    bodies = {"encoder": encoder, "ctc": ctc, "decoder": lambda g, inputs: DecoderNodes(g, network, inputs).build()}
    for graph in config.graphs():
        yield build_model(graph, config.axis, metadata, bodies[graph.name])
