"""The mixture of experts for training: one autograd function for the whole layer, and a loss on uneven loads."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from u2moe.export.moe import DenseFeedForward, MixtureOfExperts

ROW_GRID = 64
"""The number of rows per expert is padded to a multiple of this, because oneDNN compiles a kernel for each shape."""
LOAD_WEIGHT = 0.03
"""Weight of the loss on uneven loads, relative to the loss of the network."""
DERIVATIVES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.SiLU: torch.ops.aten.silu_backward,
    nn.ReLU: lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
}
"""Gradient functions of the recipe's activations. They return input gradients for output gradients and inputs."""


class AddedLoss(torch.autograd.Function):
    """Adds a loss to training through a tensor that the main loss depends on."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        """Return the unchanged carrier, a tensor of any shape. `loss` is a scalar."""
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Return the gradients of the carrier and of the loss. The loss has weight 1."""
        return gradient, gradient.new_ones(())


def load_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Return the loss on uneven loads (arXiv 2101.03961), which is 1 for even loads.

    It is the number of experts times the sum over experts of the share of choices times the mean probability. `logits`
    are [experts, tokens], and `counts` are the choices of each expert [experts].
    """
    shares = counts / counts.sum()
    return len(counts) * (shares * logits.softmax(0).mean(1)).sum()


def places(experts: Tensor, counts: Tensor) -> tuple[Tensor, list[int]]:
    """Return the row of each choice [k * tokens] in an array grouped by expert, and each expert's number of rows."""
    rows = (counts + ROW_GRID - 1) // ROW_GRID * ROW_GRID
    shifts = (rows.cumsum(0) - rows) - (counts.cumsum(0) - counts)
    chosen, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) + shifts[chosen]
    return place, rows.tolist()


class ExpertSum(torch.autograd.Function):
    """Weighted sum of the chosen experts' outputs [tokens, dim], with an explicit gradient.

    It uses k additions. A reduction over the k choices would take ten times as long in bfloat16 on CPUs.
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
        """Return the sum for `shares` [k, tokens] and `place` [k * tokens]. Parts of an expert: w_1, b_1, w_2, b_2."""
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
        """Return the gradients of tokens, shares and experts' parts for an output gradient [tokens, dim]."""
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
    """Yield the four parts of each expert in turn."""
    return zip(*[iter(parts)] * 4, strict=True)


def mixture(layer: MixtureOfExperts, x: Tensor, real: Tensor) -> Tensor:
    """Compute `MixtureOfExperts.forward` for those tokens of `x` [..., dim] that are `real` [...]. Others become zero.

    In training, the load loss is added. Padding must not count, because experts that receive only padding would seem to
    be used.
    """
    flat = x.flatten(0, -2)
    numbers = real.flatten().nonzero().squeeze(1)
    tokens = flat.index_select(0, numbers)
    logits = layer.gate.weight @ tokens.float().t()  # tokens are last: torch is slow at many short softmaxes
    experts = logits.detach().topk(layer.num_experts_per_token, dim=0).indices
    counts = torch.bincount(experts.flatten(), minlength=len(layer.experts))
    if layer.training:
        logits = AddedLoss.apply(logits, LOAD_WEIGHT * load_loss(logits, counts))  # type: ignore[no-untyped-call, unused-ignore]
    shares = logits.gather(0, experts).softmax(0).to(x.dtype)
    place, rows = places(experts, counts)
    layers = cast("list[DenseFeedForward]", list(layer.experts))
    parts = [
        part for expert in layers for part in (expert.w_1.weight, expert.w_1.bias, expert.w_2.weight, expert.w_2.bias)
    ]
    output = ExpertSum.apply(tokens, shares, place, rows, layers[0].activation, *parts)  # type: ignore[no-untyped-call, unused-ignore]
    return torch.zeros_like(flat).index_copy(0, numbers, output).view(x.shape)


def feed_forward(layer: nn.Module, x: Tensor, real: Tensor) -> Tensor:
    """Apply a dense layer or a mixture of experts to `x` [..., dim]. `real` [...] is false for padding."""
    return mixture(layer, x, real) if isinstance(layer, MixtureOfExperts) else cast("Tensor", layer(x))
