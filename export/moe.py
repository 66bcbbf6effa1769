"""Feed-forward layers in plain torch: dense, gated, and the mixture of experts with its router."""

from typing import cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import FeedForward
from u2moe.runtime.graph.activation import ACTIVATIONS


def activation(kind: str) -> nn.Module:
    """Return the torch module for one of `ACTIVATIONS`."""
    return cast("nn.Module", getattr(nn, ACTIVATIONS[kind].module)())


class DenseFeedForward(nn.Module):
    """W2 act(W1 x + b1) + b2, on [..., dim]."""

    def __init__(self, dim: int, config: FeedForward) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, config.hidden, bias=config.bias)
        self.w_2 = nn.Linear(config.hidden, dim, bias=config.bias)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        return cast("Tensor", self.w_2(self.activation(self.w_1(x))))


class GatedFeedForward(DenseFeedForward):
    """W2 (act(G x) * (W1 x + b1)) + b2, on [..., dim] (arXiv 2002.05202)."""

    def __init__(self, dim: int, config: FeedForward) -> None:
        super().__init__(dim, config)
        self.gate = nn.Linear(dim, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        return cast("Tensor", self.w_2(self.activation(self.gate(x)) * self.w_1(x)))


class MixtureOfExperts(nn.Module):
    """For each token, the weighted sum of the outputs of its top-k experts.

    The weights are a softmax over the k selected router logits. There is no noise and no capacity limit: every token
    reaches its k experts (arXiv 2404.16407). Each expert runs once, on all of its tokens together.
    """

    def __init__(self, dim: int, config: FeedForward) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, config.num_experts, bias=False)
        self.experts = nn.ModuleList(DenseFeedForward(dim, config) for _ in range(config.num_experts))
        self.num_experts_per_token = config.num_experts_per_token

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts and weights [tokens, k] for tokens [tokens, dim]. Autocast does not apply to the router."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.gate(tokens.to(self.gate.weight.dtype))
        values, experts = torch.topk(logits, self.num_experts_per_token)
        return experts, torch.softmax(values, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = self.route(tokens)
        order = torch.argsort(experts.flatten(), stable=True)
        counts = torch.bincount(experts.flatten(), minlength=len(self.experts)).tolist()
        sorted_tokens = torch.split(tokens[order // self.num_experts_per_token], counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, sorted_tokens, strict=True)])
        unsorted = outputs.index_select(0, torch.argsort(order))
        weighted = unsorted.view(*experts.shape, x.shape[-1]) * weights.unsqueeze(-1).to(outputs.dtype)
        return weighted.sum(dim=1).view(x.shape)


def feed_forward(dim: int, config: FeedForward) -> nn.Module:
    """Return a feed-forward layer of the configured kind."""
    return {"dense": DenseFeedForward, "gated": GatedFeedForward, "moe": MixtureOfExperts}[config.kind](dim, config)
