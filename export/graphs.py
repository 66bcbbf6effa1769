"""The three graphs of a bundle, built node by node from the network in `model`: encoder, CTC head and decoder.

Built by hand rather than traced: tracing would freeze a mixture of experts at the token counts of its example, and
leave names, sharing and dynamic axes to the tracer.
"""

from __future__ import annotations

import onnx_ir as ir

from u2moe.export.decoder_nodes import DecoderNodes
from u2moe.export.encoders.kinds import KINDS
from u2moe.export.encoders.network import SpeechEncoder
from u2moe.export.layers import linear
from u2moe.export.model import SpeechModel
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import ModelConfig
from u2moe.runtime.graph.builder import GraphBuilder


def encoder_graph(encoder: SpeechEncoder, config: ModelConfig, metadata: dict[str, str]) -> ir.Model:
    """The encoder, with caches if it can stream."""
    graph = contract.encoder(streaming=config.streaming, caches=config.caches)
    g = GraphBuilder(graph.name)
    inputs = {tensor.name: g.input(tensor, config.axis) for tensor in graph.inputs}
    outputs = KINDS[encoder.config.kind].nodes(g, encoder, inputs, config.max_position).build()
    return g.model(graph, inputs, outputs, config.axis, metadata)


def ctc_graph(model: SpeechModel, config: ModelConfig, metadata: dict[str, str]) -> ir.Model:
    """The CTC head."""
    graph = contract.ctc()
    g = GraphBuilder(graph.name)
    inputs = {tensor.name: g.input(tensor, config.axis) for tensor in graph.inputs}
    with g.scope("ctc", group="output_layers"):
        logits = linear(g, inputs["encoder_out"], model.ctc.ctc_lo, "ctc_lo")
        outputs = {"log_probs": g.op("LogSoftmax", logits, axis=-1)}
    return g.model(graph, inputs, outputs, config.axis, metadata)


def decoder_graph(model: SpeechModel, config: ModelConfig, metadata: dict[str, str]) -> ir.Model:
    """The attention decoder, both directions if the checkpoint has them."""
    graph = contract.decoder(bidirectional=config.bidirectional)
    g = GraphBuilder(graph.name)
    inputs = {tensor.name: g.input(tensor, config.axis) for tensor in graph.inputs}
    outputs = DecoderNodes(g, model, inputs).build()
    return g.model(graph, inputs, outputs, config.axis, metadata)
