"""The mixture of experts for training: one step of autograd for the whole layer, and a loss on uneven loads."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from u2moe.export.moe import DenseFeedForward, MixtureOfExperts

ROW_GRID = 64
"""Every expert gets a multiple of so many rows: oneDNN compiles a kernel for each shape that it meets."""
LOAD_WEIGHT = 0.01
"""Of the loss on uneven loads, beside the loss of the network."""
DERIVATIVES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.SiLU: torch.ops.aten.silu_backward,
    nn.ReLU: lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
}
"""Of the activations that the recipe uses: gradients of outputs, inputs -> gradients of inputs."""


class AddedLoss(torch.autograd.Function):
    """Lets a loss take part in training that nobody adds up: it rides on a tensor that the main loss depends on."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        """The carrier [any shape] as it is; `loss` is a scalar."""
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Gradients of both: the loss counts once."""
        return gradient, gradient.new_ones(())


def load_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Experts x sum over experts of the share of choices times the mean probability (arXiv 2101.03961); 1 if even."""
    shares = counts / counts.sum()
    return len(counts) * (shares * logits.softmax(-1).mean(0)).sum()


def places(experts: Tensor, counts: Tensor) -> tuple[Tensor, list[int]]:
    """Where each choice [tokens, k] goes when experts take rows in turn, and how many rows [experts] each takes."""
    rows = (counts + ROW_GRID - 1) // ROW_GRID * ROW_GRID
    shifts = (rows.cumsum(0) - rows) - (counts.cumsum(0) - counts)
    chosen, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) + shifts[chosen]
    return place, rows.tolist()


class ExpertSum(torch.autograd.Function):
    """Weighted sum of the chosen experts' outputs [tokens, dim]; the gradient of all is worked out here.

    Autograd through each expert's products, and through what gathers its tokens, costs as much as the products.
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
        """`shares` [tokens, k], `place` [tokens * k], and for every expert w_1, b_1, w_2, b_2."""
        sources = place.new_zeros(sum(rows))
        sources[place] = torch.arange(len(place), device=place.device) // shares.shape[1]
        inputs = tokens.index_select(0, sources)  # rows that no choice takes repeat the first token; nobody reads them
        hidden = inputs.new_empty(len(inputs), len(parts[0]))
        outputs = torch.empty_like(inputs)
        for expert, x, h in zip(range(len(rows)), torch.split(inputs, rows), torch.split(hidden, rows), strict=True):
            torch.addmm(parts[4 * expert + 1], x, parts[4 * expert].t(), out=h)
        active = cast("Tensor", activation(hidden))
        for expert, a, y in zip(range(len(rows)), torch.split(active, rows), torch.split(outputs, rows), strict=True):
            torch.addmm(parts[4 * expert + 3], a, parts[4 * expert + 2].t(), out=y)
        chosen = outputs.index_select(0, place).view(*shares.shape, -1)
        ctx.save_for_backward(shares, place, inputs, hidden, active, chosen, *parts)
        ctx.rows, ctx.derivative = rows, DERIVATIVES[type(activation)]
        return (chosen * shares.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens, the shares and every expert's parts, from that of the output [tokens, dim]."""
        shares, place, inputs, hidden, active, chosen, *parts = ctx.saved_tensors
        rows = ctx.rows
        to_shares = (chosen * gradient.unsqueeze(1)).sum(-1)
        to_outputs = torch.zeros_like(inputs)
        to_outputs.index_copy_(0, place, (gradient.unsqueeze(1) * shares.unsqueeze(-1)).flatten(0, 1))
        to_hidden = torch.empty_like(hidden)
        to_inputs = torch.empty_like(inputs)
        to_parts: list[Tensor] = []
        for expert, g, h in zip(
            range(len(rows)), torch.split(to_outputs, rows), torch.split(to_hidden, rows), strict=True
        ):
            torch.mm(g, parts[4 * expert + 2], out=h)
        to_hidden = ctx.derivative(to_hidden, hidden)
        each = (torch.split(part, rows) for part in (to_outputs, active, to_hidden, inputs, to_inputs))
        for expert, (g, a, h, x, to_x) in enumerate(zip(*each, strict=True)):
            torch.mm(h, parts[4 * expert], out=to_x)
            to_parts += [h.t() @ x, h.sum(0), g.t() @ a, g.sum(0)]
        to_tokens = to_inputs.index_select(0, place).view_as(chosen).sum(1)
        return to_tokens, to_shares, None, None, None, *to_parts


def mixture(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """As `MixtureOfExperts.forward`; in training the load loss comes with it."""
    tokens = x.flatten(0, -2)
    logits = layer.gate(tokens.float())
    experts = logits.detach().topk(layer.num_experts_per_token).indices
    counts = torch.bincount(experts.flatten(), minlength=len(layer.experts))
    if layer.training:
        logits = AddedLoss.apply(logits, LOAD_WEIGHT * load_loss(logits, counts))  # type: ignore[no-untyped-call]
    shares = logits.gather(1, experts).softmax(-1).to(x.dtype)
    place, rows = places(experts, counts)
    layers = cast("list[DenseFeedForward]", list(layer.experts))
    parts = [
        part for expert in layers for part in (expert.w_1.weight, expert.w_1.bias, expert.w_2.weight, expert.w_2.bias)
    ]
    output = ExpertSum.apply(tokens, shares, place, rows, layers[0].activation, *parts)  # type: ignore[no-untyped-call]
    return cast("Tensor", output.view(x.shape))


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of either kind on [..., dim]."""
    return mixture(layer, x) if isinstance(layer, MixtureOfExperts) else cast("Tensor", layer(x))
