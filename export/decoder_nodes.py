"""The attention decoders as ONNX nodes, both directions over the same hypotheses."""

from __future__ import annotations

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


class DecoderNodes:
    """Builds both directions of the decoder over the same hypotheses."""

    def __init__(self, g: GraphBuilder, model: SpeechModel, inputs: dict[str, ir.Value]) -> None:
        self.g = g
        self.model = model
        self.memory = inputs["encoder_out"]
        self.hyps = inputs["hyps"]
        with g.scope("hypotheses"):
            self.lens = g.op("Reshape", inputs["hyps_lens"], [-1, 1])
            num_tokens = g.op("Shape", self.hyps, start=2, end=3)
            rows = g.op("Shape", self.lens, end=1)
            self.tokens = g.op("Reshape", self.hyps, g.op("Concat", rows, num_tokens, axis=0), allowzero=1)
            length = g.op("Add", num_tokens, 1)
            self.length = length
            self.steps = g.op("Range", 0, g.op("Squeeze", length, [0]), 1)
            self.scored = g.op("LessOrEqual", self.steps, self.lens)
            queries = g.op("Unsqueeze", self.steps, [1])
            # the causal mask already hides padding, which comes last: the lengths need no mask of their own
            self.bias = mask_bias(g, g.op("LessOrEqual", self.steps, queries))
        with g.scope("memory"):
            frames = g.op("Range", 0, g.op("Squeeze", g.op("Shape", self.memory, start=1, end=2), [0]), 1)
            valid = g.op("Less", frames, g.op("Unsqueeze", inputs["encoder_lens"], [1]))
        visible = self._without_blanks(valid) if model.config.non_blank_memory else valid
        with g.scope("memory"):
            self.memory_bias = mask_bias(g, g.op("Unsqueeze", visible, [1, 2]))

    def build(self) -> dict[str, ir.Value]:
        """All nodes; returns the outputs by name."""
        g = self.g
        with g.scope("hypotheses"):
            targets = self._targets()
            inside = g.op("Less", self.steps, self.lens)
            last = g.op("Sub", self.lens, 1)
            mirror = g.op("Where", inside, g.op("Sub", last, self.steps), self.steps)
            reverse = g.op("GatherElements", targets, mirror, axis=1)
        bidirectional = self.model.right_decoder is not None
        left_log_probs = self._log_probs(self.model.left_decoder, targets, "left_decoder" if bidirectional else "")
        outputs = {
            "score": self._scores(left_log_probs, targets, None),
            "next_log_probs": self._following(left_log_probs),
        }
        if self.model.right_decoder is not None:
            right_log_probs = self._log_probs(self.model.right_decoder, reverse, "right_decoder")
            outputs["r_score"] = self._scores(right_log_probs, reverse, mirror)
        return outputs

    def _without_blanks(self, valid: ir.Value) -> ir.Value:
        """The valid frames [batch, time] whose likeliest token is not 0, or all of them if there is none.

        The graph has a CTC head of its own for this, so that no program needs to know. Frames have no positions here:
        to hide one is to leave it out.
        """
        g = self.g
        with g.scope("ctc", group="output_layers"):
            logits = linear(g, self.memory, self.model.ctc.ctc_lo, "ctc_lo")
        with g.scope("memory"):
            spoken = g.op("Greater", g.op("ArgMax", logits, axis=-1, keepdims=0), 0)
            number = g.op("Cast", g.op("And", valid, spoken), to=ir.DataType.INT64)
            is_silent = g.op("Equal", g.op("ReduceSum", number, [1], keepdims=1), 0)
            return g.op("And", valid, g.op("Or", spoken, is_silent))

    def _targets(self) -> ir.Value:
        """Tokens [rows, length+1], with eos in every position after the end of each hypothesis."""
        g, eos = self.g, self.model.config.eos
        column = g.op("Expand", eos, g.op("Shape", self.lens))
        extended = g.op("Concat", self.tokens, column, axis=1)
        return g.op("Where", g.op("Less", self.steps, self.lens), extended, eos)

    def _log_probs(self, decoder: AttentionDecoder, targets: ir.Value, name: str) -> ir.Value:
        """Predictions [rows, length+1, vocab] after sos and after each token of `targets` except the last."""
        g = self.g
        with g.scope("decoder", *([name] if name else [])):
            start = g.op("Expand", self.model.config.sos, g.op("Shape", self.lens))
            tokens = g.op("Concat", start, g.op("Slice", targets, [0], [-1], [1]), axis=1)
            with g.scope(group="embeddings"):
                table = vector(g, "embed.0.weight", decoder.embedding.weight)
            (x,) = g.call(layers.embedding(), table, tokens)
            if decoder.config.learned_positions:
                with g.scope("embed.1"):
                    encodings = cast("LearnedPositions", decoder.embed[1]).nodes(g, self.steps)
            else:
                x = g.op("Mul", x, math.sqrt(decoder.config.dim))
                encodings = sinusoids(g, self.steps, decoder.config.dim)
            x = g.op("Add", x, encodings)
            residual = Residual(g, x, pre_norm=decoder.config.pre_norm)
            for index, block in enumerate(decoder.decoders):
                with g.scope(f"decoders.{index}"):
                    self._block(residual, cast("DecoderBlock", block), decoder.config)
            if decoder.config.pre_norm:
                residual.normalize(decoder.after_norm, "after_norm")
            with g.scope(group="output_layers"):
                logits = linear(g, residual.total, decoder.output_layer, "output_layer")
            return g.op("LogSoftmax", logits, axis=-1)

    def _block(self, residual: Residual, block: DecoderBlock, config: Decoder) -> None:
        g, kind = self.g, config.feed_forward.activation

        def self_attention(x: ir.Value) -> ir.Value:
            with g.scope("self_attn", group="attention"):
                return AttentionNodes(g, block.self_attn).attend(x, x, self.bias)[0]

        residual.add(self_attention, block.norm1, "norm1")
        residual.add(lambda x: self._cross_attention(x, block, config.dim), block.norm2, "norm2")
        residual.add(lambda x: feed_forward(g, x, block.feed_forward, kind, "feed_forward"), block.norm3, "norm3")

    def _cross_attention(self, x: ir.Value, block: DecoderBlock, dim: int) -> ir.Value:
        """Attention to the encoder output, all hypotheses of an utterance as one query: its keys are computed once."""
        g = self.g
        with g.scope("src_attn", group="attention"):
            batch = g.op("Shape", self.memory, start=0, end=1)
            folded = g.op("Reshape", x, g.op("Concat", batch, [-1], [dim], axis=0))
            context = AttentionNodes(g, block.src_attn).attend(folded, self.memory, self.memory_bias)[0]
            return g.op("Reshape", context, g.op("Shape", x))

    def _scores(self, log_probs: ir.Value, targets: ir.Value, order: ir.Value | None) -> ir.Value:
        """Log-probabilities of `targets` [batch, nbest, length+1], zero after eos, reordered by `order` if given."""
        g = self.g
        with g.scope("scores"):
            picked = g.op("GatherElements", log_probs, g.op("Unsqueeze", targets, [2]), axis=2)
            scores = g.op("Squeeze", picked, [2])
            scores = scores if order is None else g.op("GatherElements", scores, order, axis=1)
            return self._per_utterance(g.op("Where", self.scored, scores, 0.0))

    def _following(self, log_probs: ir.Value) -> ir.Value:
        """The distribution after the last token of each hypothesis [batch, nbest, vocab]."""
        g = self.g
        with g.scope("following"):
            index = g.op("Unsqueeze", self.lens, [2])
            index = g.op("Expand", index, [1, 1, self.model.config.vocab_size])
            return self._per_utterance(g.op("Squeeze", g.op("GatherElements", log_probs, index, axis=1), [1]))

    def _per_utterance(self, rows: ir.Value) -> ir.Value:
        """[rows, n] to [batch, nbest, n]."""
        g = self.g
        shape = g.op("Concat", g.op("Shape", self.hyps, end=2), g.op("Shape", rows, start=1), axis=0)
        return g.op("Reshape", rows, shape)
