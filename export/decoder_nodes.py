"""Builds the attention decoders as ONNX nodes."""

import math
from typing import cast

import onnx_ir as ir

from u2moe.export.architecture import Decoder
from u2moe.export.attention_nodes import AttentionNodes
from u2moe.export.layers import Residual, feed_forward, linear, mask_bias, sinusoids, vector
from u2moe.export.model import AttentionDecoder, DecoderBlock, SpeechModel
from u2moe.export.positions import LearnedPositions
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.layers import Prefixes, shared_prefixes


class DecoderNodes:
    """Builds both directions of the decoder for the same hypotheses. Values that both use are computed once."""

    def __init__(self, g: GraphBuilder, model: SpeechModel, inputs: dict[str, ir.Value]) -> None:
        self.g, self.model, self.memory, self.hyps = g, model, inputs["encoder_out"], inputs["hyps"]
        with g.scope("hypotheses"):
            self.lens = g.op("Unsqueeze", inputs["hyps_lens"], [2])
            self.length = g.op("Add", g.op("Shape", self.hyps, start=2, end=3), 1)
            self.steps = g.op("Range", 0, g.op("Squeeze", self.length, [0]), 1)
            self.scored = g.op("LessOrEqual", self.steps, self.lens)
            queries = g.op("Unsqueeze", self.steps, [1])
            # padding comes last, so the causal mask already hides it
            self.bias = mask_bias(g, g.op("LessOrEqual", self.steps, queries))
        with g.scope("memory"):
            frames = g.op("Range", 0, g.op("Squeeze", g.op("Shape", self.memory, start=1, end=2), [0]), 1)
            valid = g.op("Less", frames, g.op("Unsqueeze", inputs["encoder_lens"], [1]))
        visible = self._without_blanks(valid) if model.config.non_blank_memory else valid
        with g.scope("memory"):
            self.memory_bias = mask_bias(g, g.op("Unsqueeze", visible, [1, 2]))

    def build(self) -> dict[str, ir.Value]:
        """Build all nodes and return the outputs by name."""
        g = self.g
        with g.scope("hypotheses"):
            # tokens [batch, nbest, length+1], with eos in every position after the end of each hypothesis
            eos = self.model.config.eos
            extended = g.op("Concat", self.hyps, g.op("Expand", eos, g.op("Shape", self.lens)), axis=2)
            targets = g.op("Where", g.op("Less", self.steps, self.lens), extended, eos)
            inside = g.op("Less", self.steps, self.lens)
            last = g.op("Sub", self.lens, 1)
            mirror = g.op("Where", inside, g.op("Sub", last, self.steps), self.steps)
            reverse = g.op("GatherElements", targets, mirror, axis=2)
        name = "" if self.model.right_decoder is None else "left_decoder"
        scores, log_probs, prefixes = self._scores(self.model.left_decoder, targets, name)
        with g.scope("following"):
            whole = g.op("Squeeze", g.op("GatherElements", prefixes.of_tokens, self.lens, axis=2), [2])
            outputs = {"score": scores, "next_log_probs": g.op("Gather", log_probs, whole, axis=0)}
        if self.model.right_decoder is not None:
            scores, *_ = self._scores(self.model.right_decoder, reverse, "right_decoder")
            with g.scope("decoder", "right_decoder", "scores"):
                outputs["r_score"] = g.op("GatherElements", scores, mirror, axis=2)
        return outputs

    def _without_blanks(self, valid: ir.Value) -> ir.Value:
        """Return a mask [batch, time] of the valid frames whose most likely token is not 0.

        If an utterance has no such frames, the mask contains all its valid frames. The graph has its own CTC head for
        this, so callers need not find blanks. Cross-attention does not depend on the positions of frames, so hiding a
        frame has the same effect as removing it.
        """
        g = self.g
        with g.scope("ctc", group="output_layers"):
            logits = linear(g, self.memory, self.model.ctc.ctc_lo, "ctc_lo")
        with g.scope("memory"):
            spoken = g.op("Greater", g.op("ArgMax", logits, axis=-1, keepdims=0), 0)
            number = g.op("Cast", g.op("And", valid, spoken), to=ir.DataType.INT64)
            is_silent = g.op("Equal", g.op("ReduceSum", number, [1], keepdims=1), 0)
            return g.op("And", valid, g.op("Or", spoken, is_silent))

    def _scores(self, decoder: AttentionDecoder, targets: ir.Value, name: str) -> tuple[ir.Value, ir.Value, Prefixes]:
        """Score `targets` [batch, nbest, length+1].

        Returns the log-probabilities of the targets (zero after eos), the log-probabilities of all tokens [prefixes,
        vocab], and the prefixes.
        """
        g, vocab_size = self.g, self.model.config.vocab_size
        with g.scope("decoder", *([name] if name else [])):
            with g.scope("prefixes"):
                start = g.op("Expand", self.model.config.sos, g.op("Shape", self.lens))
                tokens = g.op("Concat", start, g.op("Slice", targets, [0], [-1], [2]), axis=2)
                prefixes = Prefixes(*g.call(shared_prefixes(), tokens, self.lens))
            log_probs = self._log_probs(decoder, tokens, prefixes)
            with g.scope("scores"):
                index = g.op("Add", g.op("Mul", prefixes.of_tokens, vocab_size), targets)
                scores = g.op("Gather", g.op("Reshape", log_probs, [-1]), index, axis=0)
                return g.op("Where", self.scored, scores, 0.0), log_probs, prefixes

    def _log_probs(self, decoder: AttentionDecoder, tokens: ir.Value, prefixes: Prefixes) -> ir.Value:
        """Return log-probabilities [prefixes, vocab] after prefixes of `tokens` [batch, nbest, length+1]."""
        g = self.g
        with g.scope("prefixes"):
            own = g.op("Gather", g.op("Reshape", tokens, [-1]), prefixes.ends, axis=0)
        with g.scope(group="embeddings"):
            table = vector(g, "embed.0.weight", decoder.embedding.weight)
        (x,) = g.call(layers.embedding(), table, own)
        if decoder.config.learned_positions:
            with g.scope("embed.1"):
                encodings = cast("LearnedPositions", decoder.embed[1]).nodes(g, self.steps)
        else:
            x = g.op("Mul", x, math.sqrt(decoder.config.dim))
            encodings = sinusoids(g, self.steps, decoder.config.dim)
        with g.scope("prefixes"):
            x = g.op("Add", x, g.op("Gather", encodings, g.op("Mod", prefixes.ends, self.length), axis=0))
        residual = Residual(g, x, pre_norm=decoder.config.pre_norm)
        for index, block in enumerate(decoder.decoders):
            with g.scope(f"decoders.{index}"):
                self._block(residual, cast("DecoderBlock", block), decoder.config, prefixes)
        if decoder.config.pre_norm:
            residual.normalize(decoder.after_norm, "after_norm")
        with g.scope(group="output_layers"):
            logits = linear(g, residual.total, decoder.output_layer, "output_layer")
        return g.op("LogSoftmax", logits, axis=-1)

    def _block(self, residual: Residual, block: DecoderBlock, config: Decoder, prefixes: Prefixes) -> None:
        g, kind = self.g, config.feed_forward.activation

        def self_attention(x: ir.Value) -> ir.Value:
            """Attend within hypotheses. The keys of a prefix are computed once for all hypotheses that share it."""
            with g.scope("self_attn", group="attention"):
                places = g.op("Reshape", prefixes.of_tokens, g.op("Concat", [-1], self.length, axis=0))
                return AttentionNodes(g, block.self_attn).gathered(x, None, self.bias, places, prefixes.ends)

        def cross_attention(x: ir.Value) -> ir.Value:
            """Attend to the encoder's output. All prefixes of an utterance share its keys, which are computed once."""
            with g.scope("src_attn", group="attention"):
                layer, rows = AttentionNodes(g, block.src_attn), prefixes.of_utterances
                return layer.gathered(x, self.memory, self.memory_bias, rows, prefixes.places)

        residual.add(self_attention, block.norm1, "norm1")
        residual.add(cross_attention, block.norm2, "norm2")
        residual.add(lambda x: feed_forward(g, x, block.feed_forward, kind, "feed_forward"), block.norm3, "norm3")
