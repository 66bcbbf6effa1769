"""The optimizer: Muon for hidden matrices and AdamW for other weights, on float32 masters of a network in bfloat16.

Muon (Jordan et al., 2024) makes the momentum of every matrix orthogonal before it is added to the weights. All
directions then learn at the same rate, so CTC finds an alignment in a fraction of the time that AdamW needs. Muon's
steps are scaled to the size of AdamW's steps (arXiv 2502.16982), so the two can share one learning rate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from network import HEAD
from torch import Tensor, nn

MOMENTUM = 0.95
UPDATE_RMS = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MAX_NORM = 5.0
PIECE = 16
"""Maximum number of matrices in a piece."""
ROUTER_RATE = 0.1
"""Learning rate of routers relative to that of other weights. At the full rate, the halves of a copied layer would
separate within ten steps."""
AVERAGED_STEPS, AVERAGED_SHARE = 4000, 0.1


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices [count, rows, columns], changed so that their singular values are near 1.

    The method is a quintic Newton-Schulz iteration. It needs rows <= columns.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.float()


def orthogonalize(pieces: Sequence[Tensor]) -> None:
    """Make the matrices in some pieces orthogonal, in place."""
    for piece in pieces:
        rows, columns = piece.shape[1:]
        piece.copy_(orthogonalized(piece.mT).mT if rows > columns else orthogonalized(piece))


def work(piece: Tensor) -> int:
    """Return a measure of the work for a piece: the number of products in a Newton-Schulz step."""
    count, (short, long) = len(piece), sorted(piece.shape[1:])
    return count * short**2 * (2 * long + short)


class Muon(torch.optim.Optimizer):
    """Muon on weights, which are viewed as matrices [rows, all other axes].

    Up to `PIECE` matrices of one shape form a piece [count, rows, columns] and are computed together. Processes can
    share the work on `pieces`. The result does not depend on the distribution.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for weight in self.param_groups[0]["params"]:
            alike[len(weight), weight[0].numel()].append(weight)
        self.members = [
            weights[start : start + PIECE] for weights in alike.values() for start in range(0, len(weights), PIECE)
        ]
        self.pieces = [
            torch.stack([weight.detach().flatten(1) for weight in weights]).contiguous() for weights in self.members
        ]

    @torch.no_grad()
    def step(self, orthogonalize: Callable[[Sequence[Tensor]], None] = orthogonalize) -> None:  # type: ignore[override]
        """Update every weight along its gradient."""
        for members, piece in zip(self.members, self.pieces, strict=True):
            for weight, move in zip(members, piece, strict=True):
                move.copy_(self._momentum(weight))
        orthogonalize(self.pieces)
        (group,) = self.param_groups
        for members, piece in zip(self.members, self.pieces, strict=True):
            weights: list[Tensor] = [*members]
            size = group["lr"] * UPDATE_RMS * max(piece.shape[1:]) ** 0.5
            moves = [move.view(weight.shape) for move, weight in zip(piece, weights, strict=True)]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, moves, alpha=-size)

    def _momentum(self, weight: nn.Parameter) -> Tensor:
        """Return the running mean of a weight's gradients with Nesterov's look-ahead, as a matrix [rows, columns]."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1)


def is_router(name: str) -> bool:
    """Return whether a weight belongs to a router."""
    return name.endswith("gate.weight")


def is_head(name: str) -> bool:
    """Return whether a weight belongs to the head that predicts a teacher's targets."""
    return name.startswith(f"{HEAD}.")


def suits_muon(name: str, weight: Tensor) -> bool:
    """Return whether a weight is a hidden matrix. Routers and matrices connected to the vocabulary are not."""
    others = (HEAD, "gate", "pos_bias", "embed.0", "output_layer", "ctc", "depthwise")
    return weight.ndim > 1 and weight[0].numel() > 9 and not any(part in name for part in others)


class Optimizer:
    """Optimizer with float32 masters of a network's weights.

    `average` is a running mean of the masters over about the last tenth of all steps, but at most `AVERAGED_STEPS`. It
    is smoother than the masters of a single step. Steps before `averaged_from` are excluded.
    """

    def __init__(self, model: nn.Module, averaged_from: int = 0) -> None:
        self.model, self.averaged_from = model, averaged_from
        self.masters = {
            name: nn.Parameter(weight.detach().float().clone()) for name, weight in model.named_parameters()
        }
        self.average = {name: weight.detach().clone() for name, weight in self.masters.items()}
        matrices = [weight for name, weight in self.masters.items() if suits_muon(name, weight)]
        routers = [weight for name, weight in self.masters.items() if is_router(name)]
        head = [weight for name, weight in self.masters.items() if is_head(name)]
        others = [
            weight
            for name, weight in self.masters.items()
            if not (suits_muon(name, weight) or is_router(name) or is_head(name))
        ]
        self.muon = Muon(matrices, lr=0.0, weight_decay=0.05)
        self.parts: list[torch.optim.Optimizer] = [
            self.muon,
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]
        self.rates = [1.0, 1.0]
        for weights, rate in ((routers, ROUTER_RATE), (head, 1.0)):  # the head is last, since a run may gain or lose it
            if weights:
                self.parts.append(torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True))
                self.rates.append(rate)

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        lr: float,
        num_steps: int,
        orthogonalize: Callable[[Sequence[Tensor]], None] = orthogonalize,
    ) -> float:
        """Update the masters with float32 gradients, in the order of the parameters, and copy them into the network.

        `num_steps` is the number of earlier steps. `orthogonalize` is called with pieces of `muon`. Returns the norm of
        the gradient. If the norm is not finite, nothing changes.
        """
        for weight, gradient in zip(self.masters.values(), gradients, strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.masters.values(), MAX_NORM)
        if norm.isfinite():
            for part, share in zip(self.parts, self.rates, strict=True):
                part.param_groups[0]["lr"] = lr * share
            self.muon.step(orthogonalize)
            for part in self.parts[1:]:
                part.step()
            averages: list[Tensor] = [*self.average.values()]
            masters: list[Tensor] = [*self.masters.values()]
            since = max(num_steps - self.averaged_from, 0) + 1
            torch._foreach_lerp_(averages, masters, 1 / min(num_steps * AVERAGED_SHARE + 1, since, AVERAGED_STEPS))
            self.write(self.masters)
        return float(norm)

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the network: the masters or their average."""
        for name, weight in self.model.named_parameters():
            weight.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to continue exactly."""
        return {
            "masters": {name: weight.detach() for name, weight in self.masters.items()},
            "average": self.average,
            "parts": [part.state_dict() for part in self.parts],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, and write its masters into the network. If the state lacks `parts`, momentum starts at zero.

        If the state lacks the head, the head does not change. If the network lacks the head, the state's is ignored.
        """
        for name, weight in self.masters.items():
            if is_head(name) and name not in state["masters"]:
                continue
            weight.copy_(state["masters"][name])
            self.average[name].copy_(state["average"][name])
        for part, saved in zip(self.parts, state["parts"] or (), strict=False):
            part.load_state_dict(saved)
        self.write(self.masters)
