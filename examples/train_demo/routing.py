"""What training adds to a mixture of experts: noise on its routers, and matrices of few different shapes."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from u2moe.export.moe import DenseFeedForward, MixtureOfExperts

ROW_GRID = 64


class RouterNoise:
    """Random numbers on the logits of every router, so that no expert is forgotten before it has learnt something.

    `scale` is their standard deviation, relative to that of the logits; the trained model knows nothing of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.scale = 0.0
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.gate.register_forward_hook(self._disturbed)

    def _disturbed(self, router: nn.Module, _: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return logits + self.scale * logits.detach().std() * torch.randn_like(logits) if router.training else logits


def round_shapes(model: nn.Module) -> None:
    """Lets every expert see a multiple of `ROW_GRID` tokens, padding with zeros.

    How many tokens an expert gets changes with every batch, and oneDNN compiles a kernel for each shape that it meets:
    without this two thirds of the time go there.
    """

    def attach(expert: nn.Module) -> None:
        rows = 0

        def pad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal rows
            rows = len(inputs[0])
            return (functional.pad(inputs[0], (0, 0, 0, -rows % ROW_GRID)),)

        def cut(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output[:rows]

        expert.register_forward_pre_hook(pad)
        expert.register_forward_hook(cut)

    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            for expert in module.experts:
                assert isinstance(expert, DenseFeedForward)
                attach(expert)
