"""Divides work into batches, each for one call of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def batches_of(items: Iterable[T], joins: Callable[[list[T], T], bool]) -> list[list[T]]:
    """Batches of items, in order: each item joins the batch before it if `joins(batch, item)`, or begins another."""
    batches: list[list[T]] = []
    for item in items:
        if batches and joins(batches[-1], item):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
