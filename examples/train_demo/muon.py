"""Muon (Jordan et al., 2024): momentum whose matrices are made orthogonal before they are added to the weights.

All directions of a matrix then learn at one rate, which brings CTC to an alignment in a fraction of AdamW's time. Steps
are scaled to the size of AdamW's (arXiv 2502.16982), so that both share one learning rate.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
UPDATE_RMS = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices [count, rows, columns], rows <= columns, with singular values near 1, by a quintic Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.float()


class Muon(torch.optim.Optimizer):
    """Muon on weights seen as matrices [rows, everything else]; matrices of one shape are one product."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Moves every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[len(weight), weight[0].numel()].append(weight)
            for (rows, columns), weights in alike.items():
                moves = torch.stack([self._momentum(weight) for weight in weights])
                moves = orthogonalized(moves.mT).mT if rows > columns else orthogonalized(moves)
                size = group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    weights, [move.view(weight.shape) for move, weight in zip(moves, weights, strict=True)], alpha=-size
                )

    def _momentum(self, weight: nn.Parameter) -> Tensor:
        """Nesterov's look ahead of the running mean of gradients [rows, columns]."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1)


def muon_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon suits: those of hidden layers, neither routers nor what touches the vocabulary."""
    names = ("gate", "pos_bias", "embed.0", "output_layer", "ctc", "depthwise")
    return [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and not any(part in name for part in names) and weight[0].numel() > 9
    ]
