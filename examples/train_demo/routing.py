"""The mixture of experts for training: one autograd step for the whole layer, and a loss on uneven loads."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from u2moe.export.moe import DenseFeedForward, MixtureOfExperts

ROW_GRID = 64
"""Rows per expert are padded to a multiple of this, because oneDNN compiles a kernel for each shape."""
LOAD_WEIGHT = 0.03
"""Weight of the loss on uneven loads, relative to the loss of the network."""
DERIVATIVES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.SiLU: torch.ops.aten.silu_backward,
    nn.ReLU: lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
}
"""Gradients of the recipe's activations: gradients of outputs and inputs to gradients of inputs."""


class AddedLoss(torch.autograd.Function):
    """Adds a loss to training through a tensor that the main loss depends on."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        """Return the unchanged carrier [any shape]; `loss` is a scalar."""
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Return the gradients of both: the loss has weight 1."""
        return gradient, gradient.new_ones(())


def load_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Return experts x sum over experts of share of choices [experts] times mean probability (arXiv 2101.03961).

    `logits` are [experts, tokens]. The result is 1 for even loads.
    """
    shares = counts / counts.sum()
    return len(counts) * (shares * logits.softmax(0).mean(1)).sum()


def places(experts: Tensor, counts: Tensor) -> tuple[Tensor, list[int]]:
    """Return the row of each choice [k * tokens], grouped by expert, and each expert's number of rows [experts]."""
    rows = (counts + ROW_GRID - 1) // ROW_GRID * ROW_GRID
    shifts = (rows.cumsum(0) - rows) - (counts.cumsum(0) - counts)
    chosen, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) + shifts[chosen]
    return place, rows.tolist()


class ExpertSum(torch.autograd.Function):
    """The weighted sum of the chosen experts' outputs [tokens, dim], with an explicit gradient.

    It uses k additions instead of a reduction over the k choices, which takes ten times as long in bfloat16 on CPUs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        shares: Tensor,
        place: Tensor,
        rows: list[int],
        activation: nn.Module,
        *parts: Tensor,
    ) -> Tensor:
        """Sum for `shares` [k, tokens], `place` [k * tokens], and w_1, b_1, w_2, b_2 of every expert."""
        sources, row_shares = place.new_zeros(sum(rows)), shares.new_zeros(sum(rows), 1)
        sources[place] = torch.arange(len(tokens), device=place.device).repeat(len(shares))
        row_shares[place, 0] = shares.flatten()
        inputs = tokens.index_select(0, sources)  # unused rows repeat the first token, with share 0
        hidden = inputs.new_empty(len(inputs), len(parts[0]))
        outputs = torch.empty_like(inputs)
        for (w_1, b_1, _, _), x, h in zip(
            fours(parts), torch.split(inputs, rows), torch.split(hidden, rows), strict=True
        ):
            torch.addmm(b_1, x, w_1.t(), out=h)
        active = cast("Tensor", activation(hidden))
        for (_, _, w_2, b_2), a, y in zip(
            fours(parts), torch.split(active, rows), torch.split(outputs, rows), strict=True
        ):
            torch.addmm(b_2, a, w_2.t(), out=y)
        chosen = outputs.index_select(0, place).view(*shares.shape, -1)
        ctx.save_for_backward(sources, row_shares, place, inputs, hidden, active, chosen, *parts)
        ctx.rows, ctx.derivative = rows, DERIVATIVES[type(activation)]
        total = chosen[0] * shares[0].unsqueeze(1)
        for output, share in zip(chosen[1:], shares[1:], strict=True):
            total.addcmul_(output, share.unsqueeze(1))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, shares and experts' parts, from that of the output [tokens, dim]."""
        sources, row_shares, place, inputs, hidden, active, chosen, *parts = ctx.saved_tensors
        rows = ctx.rows
        to_outputs = gradient.index_select(0, sources).mul_(row_shares)
        to_active, to_inputs = torch.empty_like(hidden), torch.empty_like(inputs)
        for (_, _, w_2, _), g, h in zip(
            fours(parts), torch.split(to_outputs, rows), torch.split(to_active, rows), strict=True
        ):
            torch.mm(g, w_2, out=h)
        to_hidden = ctx.derivative(to_active, hidden)
        to_parts: list[Tensor] = []
        each = (torch.split(part, rows) for part in (to_outputs, active, to_hidden, inputs, to_inputs))
        for (w_1, _, _, _), g, a, h, x, to_x in zip(fours(parts), *each, strict=True):
            torch.mm(h, w_1, out=to_x)
            to_parts += [h.t() @ x, h.sum(0), g.t() @ a, g.sum(0)]
        first, *others = to_inputs.index_select(0, place).view_as(chosen)
        return sum(others, first), (chosen * gradient).sum(-1), None, None, None, *to_parts


def fours(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parts of one expert after the other."""
    return zip(*[iter(parts)] * 4, strict=True)


def mixture(layer: MixtureOfExperts, x: Tensor, real: Tensor) -> Tensor:
    """Compute `MixtureOfExperts.forward` for the `real` [...] tokens of `x` [..., dim]; the others become zero.

    In training the load loss is added. Padding must not count, because experts that receive only padding would seem
    busy.
    """
    flat = x.flatten(0, -2)
    numbers = real.flatten().nonzero().squeeze(1)
    tokens = flat.index_select(0, numbers)
    logits = layer.gate.weight @ tokens.float().t()  # tokens last: torch is slow at many short softmaxes
    experts = logits.detach().topk(layer.num_experts_per_token, dim=0).indices
    counts = torch.bincount(experts.flatten(), minlength=len(layer.experts))
    if layer.training:
        logits = AddedLoss.apply(logits, LOAD_WEIGHT * load_loss(logits, counts))  # type: ignore[no-untyped-call]
    shares = logits.gather(0, experts).softmax(0).to(x.dtype)
    place, rows = places(experts, counts)
    layers = cast("list[DenseFeedForward]", list(layer.experts))
    parts = [
        part for expert in layers for part in (expert.w_1.weight, expert.w_1.bias, expert.w_2.weight, expert.w_2.bias)
    ]
    output = ExpertSum.apply(tokens, shares, place, rows, layers[0].activation, *parts)  # type: ignore[no-untyped-call]
    return torch.zeros_like(flat).index_copy(0, numbers, output).view(x.shape)


def feed_forward(layer: nn.Module, x: Tensor, real: Tensor) -> Tensor:
    """Apply a layer of either kind to [..., dim]; `real` [...] is false for padding."""
    return mixture(layer, x, real) if isinstance(layer, MixtureOfExperts) else cast("Tensor", layer(x))
