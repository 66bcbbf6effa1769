"""Computes rows for new routers from the tokens that a dense layer sees. Each copy of the layer gets one cluster.

Random rows would split the tokens at random and unevenly. Balanced clusters give every copy its own kind of token from
the first step. They are far enough apart that training does not mix the halves of different copies.
"""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

NUM_ROUNDS = 60
NUM_TOKENS = 20_000
BALANCE_RATE = 0.5
TYPICAL_MARGIN = 1.0
"""Median difference between the highest logit and the second highest, with the finished rows."""


class TokenRecord:
    """Context manager that records the inputs of feed-forward layers."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        self.layers = dict(layers)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    def __enter__(self) -> Self:
        self.hooks = [
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: self.seen[name].append(inputs[0].detach().flatten(0, -2).float())
            )
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def tokens(self, name: str, generator: torch.Generator) -> Tensor:
        """Return at most `NUM_TOKENS` tokens [tokens, dim] of a layer, in random order."""
        tokens = torch.cat(self.seen[name])
        return tokens[torch.randperm(len(tokens), generator=generator)[:NUM_TOKENS]]


def unit_direction(tokens: Tensor) -> Tensor:
    """Return a vector [dim] whose product with every token [tokens, dim] is near 1. It gives rows a bias."""
    gram = tokens.T @ tokens
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    solution: Tensor = torch.linalg.solve(gram + ridge, tokens.sum(0))
    return solution


def router_rows(tokens: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    """Return rows [num_rows, dim] of a router. Each has the highest product with about the same number of tokens.

    `tokens` are [tokens, dim]. The method is spherical k-means with a bias for each cluster. The bias rises while the
    cluster is too small.
    """
    centered = tokens - tokens.mean(0)
    rows = centered[torch.randperm(len(centered), generator=generator)[:num_rows]]
    biases = torch.zeros(num_rows)
    unit = unit_direction(tokens)
    size = centered.norm(dim=1).mean()
    for round_number in range(NUM_ROUNDS):
        rows = nn.functional.normalize(rows)
        chosen = (tokens @ (rows + biases[:, None] * unit).T).argmax(1)
        shares = torch.bincount(chosen, minlength=num_rows) / len(tokens)
        biases -= BALANCE_RATE / (1 + 0.1 * round_number) * size * (shares - 1 / num_rows)
        rows = torch.stack(
            [centered[chosen == row].mean(0) if shares[row] > 0 else rows[row] for row in range(num_rows)]
        )
    rows = nn.functional.normalize(rows)
    biases = balanced(tokens, rows, unit, biases)
    rows = rows + biases[:, None] * unit
    best = (tokens @ rows.T).topk(2).values
    return rows * (TYPICAL_MARGIN / (best[:, 0] - best[:, 1]).median())


def balanced(tokens: Tensor, rows: Tensor, unit: Tensor, biases: Tensor) -> Tensor:
    """Return biases [rows] with which every row is chosen about equally often."""
    products = tokens @ rows.T
    heights = (tokens @ unit)[:, None]
    step = products.std()
    for _ in range(300):
        shares = torch.bincount((products + heights * biases).argmax(1), minlength=len(rows)) / len(tokens)
        biases = biases - 0.2 * step * (shares - 1 / len(rows))
        step = step * 0.99
    return biases
