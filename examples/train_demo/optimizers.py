"""The optimizer: Muon for hidden matrices, AdamW for the rest, on float32 masters of a network in bfloat16.

Muon (Jordan et al., 2024) makes the momentum of every matrix orthogonal before it is added to the weights. All
directions then learn at one rate, which brings CTC to an alignment in a fraction of AdamW's time. Its steps are scaled
to the size of AdamW's (arXiv 2502.16982), so that both share one learning rate.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
UPDATE_RMS = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MAX_NORM = 5.0
ROUTER_RATE = 0.1
"""Of the routers' learning rate to that of all else: at a full one the halves of a copied layer part in ten steps."""
AVERAGED_STEPS, AVERAGED_SHARE = 1000, 0.1


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
            for (rows, columns), alike_weights in alike.items():
                weights: list[Tensor] = [*alike_weights]
                moves = torch.stack([self._momentum(weight) for weight in alike_weights])
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


def is_router(name: str) -> bool:
    """Whether a weight is a router's."""
    return name.endswith("gate.weight")


def suits_muon(name: str, weight: Tensor) -> bool:
    """Whether a weight is a hidden matrix: no router, and nothing that touches the vocabulary."""
    others = ("gate", "pos_bias", "embed.0", "output_layer", "ctc", "depthwise")
    return weight.ndim > 1 and weight[0].numel() > 9 and not any(part in name for part in others)


class Optimizer:
    """Float32 masters of a network's weights, moved by gradients that were found with the network's own type.

    `average` follows the masters: a mean over about the last tenth of all steps, at most `AVERAGED_STEPS`, which is
    smoother than any one of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masters = {
            name: nn.Parameter(weight.detach().float().clone()) for name, weight in model.named_parameters()
        }
        self.average = {name: weight.detach().clone() for name, weight in self.masters.items()}
        matrices = [weight for name, weight in self.masters.items() if suits_muon(name, weight)]
        routers = [weight for name, weight in self.masters.items() if is_router(name)]
        others = [
            weight for name, weight in self.masters.items() if not suits_muon(name, weight) and not is_router(name)
        ]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=0.0, weight_decay=0.05),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]
        if routers:
            self.parts.append(torch.optim.AdamW(routers, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True))

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float, num_steps: int) -> float:
        """Moves the masters along float32 gradients, in order of the parameters, and copies them into the network.

        `num_steps` were taken before. Returns the norm of the gradient; if it is not finite, nothing moves.
        """
        for weight, gradient in zip(self.masters.values(), gradients, strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.masters.values(), MAX_NORM)
        if norm.isfinite():
            for part, share in zip(self.parts, (1.0, 1.0, ROUTER_RATE), strict=False):
                part.param_groups[0]["lr"] = lr * share
                part.step()
            averages: list[Tensor] = [*self.average.values()]
            masters: list[Tensor] = [*self.masters.values()]
            torch._foreach_lerp_(averages, masters, 1 / min(num_steps * AVERAGED_SHARE + 1, AVERAGED_STEPS))
            self.write(self.masters)
        return float(norm)

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights, the masters or their average, into the network."""
        for name, weight in self.model.named_parameters():
            weight.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly."""
        return {
            "masters": {name: weight.detach() for name, weight in self.masters.items()},
            "average": self.average,
            "parts": [part.state_dict() for part in self.parts],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state, and writes its masters into the network; without `parts` the momentum starts anew."""
        for name, weight in self.masters.items():
            weight.copy_(state["masters"][name])
            self.average[name].copy_(state["average"][name])
        for part, saved in zip(self.parts, state["parts"] or (), strict=bool(state["parts"])):
            part.load_state_dict(saved)
        self.write(self.masters)
