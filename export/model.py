"""The U2++ network in plain torch, with WeNet's tensor names: encoder, CTC head, decoders. Also the decoders' nodes."""

import math
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import Architecture, Decoder
from u2moe.export.attention import MultiHeadAttention, added, norm, positional_encoding
from u2moe.export.encoders.kinds import KINDS
from u2moe.export.layers import AttentionNodes, Residual, feed_forward, linear, mask_bias, sinusoids, vector
from u2moe.export.moe import feed_forward as torch_feed_forward
from u2moe.export.positions import LearnedPositions
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.layers import Prefixes, shared_prefixes


class DecoderBlock(nn.Module):
    """Residual layers: causal self-attention, attention to the encoder's output, and feed-forward."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.self_attention)
        self.src_attn = MultiHeadAttention(config.dim, config.cross_attention)
        self.feed_forward = torch_feed_forward(config.dim, config.feed_forward)
        self.norm1, self.norm2, self.norm3 = (norm(config.dim, config.norm) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Apply the block to [rows, length, dim], with `memory` [rows, time, dim] and masks [rows, 1, length, keys]."""
        own, source = self.self_attn, self.src_attn
        x = added(x, lambda y: own(y, own.keys_values(y), mask), self.norm1, self.pre_norm)
        x = added(x, lambda y: source(y, source.keys_values(memory), memory_mask), self.norm2, self.pre_norm)
        return added(x, self.feed_forward, self.norm3, self.pre_norm)


class AttentionDecoder(nn.Module):
    """One direction of the attention decoder."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        learned = [LearnedPositions(config.dim)] if config.learned_positions else []
        self.embed = nn.Sequential(nn.Embedding(config.vocab_size, config.dim), *learned)
        self.decoders = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_blocks))
        self.after_norm = norm(config.dim, config.norm)
        self.output_layer = nn.Linear(config.dim, config.vocab_size)

    def forward(self, inputs: Tensor, lengths: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
        """Return logits [rows, length, vocab] for the token after each of `inputs` [rows, length].

        Each row of `inputs` starts with sos. `visible` [rows, time] is true for frames of `memory` [rows, time, dim]
        that the decoder may attend to.
        """
        steps = torch.arange(inputs.shape[1], device=inputs.device)
        mask = (steps.unsqueeze(1) >= steps) & (steps < lengths.view(-1, 1, 1))
        x = self.embed[0](inputs)
        if self.config.learned_positions:
            x = x + self.embed[1](steps)
        else:
            x = x * math.sqrt(self.config.dim) + positional_encoding(steps, self.config.dim)
        for block in self.decoders:
            x = block(x, mask.unsqueeze(1), memory, visible[:, None, None])
        return cast("Tensor", self.output_layer(self.after_norm(x) if self.config.pre_norm else x))


class CTCHead(nn.Module):
    """Projection to log-probabilities over the vocabulary."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(dim, vocab_size)

    def forward(self, encoder_out: Tensor) -> Tensor:
        """Return log-probabilities [batch, time, vocab] for [batch, time, dim]."""
        return torch.log_softmax(self.ctc_lo(encoder_out), dim=-1)


class SpeechModel(nn.Module):
    """Encoder, CTC head and attention decoders of one checkpoint."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        kind = KINDS[config.encoder.kind]
        self.encoder = kind.network(config.encoder, kind.block)
        self.ctc = CTCHead(config.encoder.dim, config.vocab_size)
        self.decoder: nn.Module | None = None
        if config.left_decoder is not None:
            self.decoder = left = AttentionDecoder(config.left_decoder)
            if config.right_decoder is not None:
                right = AttentionDecoder(config.right_decoder)
                self.decoder = nn.ModuleDict({"left_decoder": left, "right_decoder": right})

    @property
    def left_decoder(self) -> AttentionDecoder:
        """The left-to-right decoder; ValueError if the checkpoint has none."""
        left = self.decoder["left_decoder"] if isinstance(self.decoder, nn.ModuleDict) else self.decoder
        if isinstance(left, AttentionDecoder):
            return left
        raise ValueError("this model has no attention decoder")

    @property
    def right_decoder(self) -> AttentionDecoder | None:
        """The right-to-left decoder, if there is one."""
        both = self.decoder
        return cast("AttentionDecoder", both["right_decoder"]) if isinstance(both, nn.ModuleDict) else None

    def score(
        self, hypotheses: Tensor, lengths: Tensor, encoder_out: Tensor, encoder_lengths: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the decoder graph's `score`, `r_score` (None without a right decoder) and `next_log_probs`.

        `u2moe.runtime.bundle.contract.decoder` describes them. `hypotheses` [rows, length] exclude sos and eos;
        `encoder_out` is [rows, time, dim].
        """
        rows, length = hypotheses.shape
        steps = torch.arange(length + 1, device=hypotheses.device)
        inside = steps[:length] < lengths.unsqueeze(1)
        padded = hypotheses.masked_fill(~inside, self.config.eos)
        targets = torch.cat((padded, padded.new_full((rows, 1), self.config.eos)), dim=1)
        scored = steps <= lengths.unsqueeze(1)
        visible = torch.arange(encoder_out.shape[1], device=encoder_out.device) < encoder_lengths.unsqueeze(1)
        if self.config.non_blank_memory:
            spoken = visible & (self.ctc.ctc_lo(encoder_out).argmax(dim=-1) != 0)
            # WeNet fails if all frames are blank; here the decoders then attend to all of them
            visible = torch.where(spoken.any(dim=1, keepdim=True), spoken, visible)

        def log_probs(decoder: AttentionDecoder, tokens: Tensor) -> Tensor:
            inputs = torch.cat((tokens.new_full((rows, 1), self.config.sos), tokens), dim=1)
            return torch.log_softmax(decoder(inputs, lengths + 1, encoder_out, visible), dim=-1)

        def gathered(distribution: Tensor, wanted: Tensor) -> Tensor:
            return distribution.gather(2, wanted.unsqueeze(2)).squeeze(2)

        left = log_probs(self.left_decoder, padded)
        score = gathered(left, targets).masked_fill(~scored, 0.0)
        following = left[torch.arange(rows), lengths]
        if self.right_decoder is None:
            return score, None, following
        # position j of the reversed hypothesis is token lengths-1-j; eos stays where it is
        mirror = torch.where(steps < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - steps, steps)
        reversed_targets = targets.gather(1, mirror)
        right = log_probs(self.right_decoder, reversed_targets[:, :length])
        r_score = gathered(right, reversed_targets).gather(1, mirror).masked_fill(~scored, 0.0)
        return score, r_score, following


class DecoderNodes:
    """Builds both directions of the decoder for the same hypotheses. Values that both use are computed once."""

    def __init__(self, g: GraphBuilder, model: SpeechModel, inputs: dict[str, ir.Value]) -> None:
        self.g, self.model, self.memory, self.hyps = g, model, inputs["encoder_out"], inputs["hyps"]
        with g.scope("hypotheses"):
            self.lens = g.op("Unsqueeze", inputs["hyps_lens"], [2])
            self.length = g.op("Add", g.op("Shape", self.hyps, start=2, end=3), 1)
            self.steps = g.op("Range", 0, g.op("Squeeze", self.length, [0]), 1)
            self.scored = g.op("LessOrEqual", self.steps, self.lens)
            # padding comes last, so the causal mask already hides it
            self.bias = mask_bias(g, g.op("LessOrEqual", self.steps, g.op("Unsqueeze", self.steps, [1])))
        with g.scope("memory"):
            frames = g.op("Range", 0, g.op("Squeeze", g.op("Shape", self.memory, start=1, end=2), [0]), 1)
            valid = g.op("Less", frames, g.op("Unsqueeze", inputs["encoder_lens"], [1]))
        if model.config.non_blank_memory:
            # Only frames whose most likely token is not 0 are visible, or all valid frames if an utterance has no such
            # frames. The graph has its own CTC head, so callers need not find blanks. Cross-attention does not depend
            # on the positions of frames, so hiding a frame has the same effect as removing it.
            with g.scope("ctc", group="output_layers"):
                logits = linear(g, self.memory, model.ctc.ctc_lo, "ctc_lo")
            with g.scope("memory"):
                spoken = g.op("Greater", g.op("ArgMax", logits, axis=-1, keepdims=0), 0)
                number = g.op("Cast", g.op("And", valid, spoken), to=ir.DataType.INT64)
                is_silent = g.op("Equal", g.op("ReduceSum", number, [1], keepdims=1), 0)
                valid = g.op("And", valid, g.op("Or", spoken, is_silent))
        with g.scope("memory"):
            self.memory_bias = mask_bias(g, g.op("Unsqueeze", valid, [1, 2]))

    def build(self) -> dict[str, ir.Value]:
        """Build all nodes and return the outputs by name."""
        g = self.g
        with g.scope("hypotheses"):
            # tokens [batch, nbest, length+1], with eos in every position after the end of each hypothesis
            eos = self.model.config.eos
            extended = g.op("Concat", self.hyps, g.op("Expand", eos, g.op("Shape", self.lens)), axis=2)
            targets = g.op("Where", g.op("Less", self.steps, self.lens), extended, eos)
            inside, last = g.op("Less", self.steps, self.lens), g.op("Sub", self.lens, 1)
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

    def _scores(self, decoder: AttentionDecoder, targets: ir.Value, name: str) -> tuple[ir.Value, ir.Value, Prefixes]:
        """Return log-probabilities of `targets` [batch, nbest, length+1] (0 after eos), of all tokens, and prefixes."""
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
            table = vector(g, "embed.0.weight", cast("nn.Embedding", decoder.embed[0]).weight)
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
