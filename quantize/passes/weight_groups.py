"""Adds the group of each weight to graphs that were written before weights recorded it."""

from __future__ import annotations

import onnx_ir as ir

from u2moe.quantize.passes.rewrite import Rewrite
from u2moe.quantize.weights import Weights
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.graph.mixture import mixture_of


class WeightGroups(Rewrite):
    """Afterwards every weight records its group; one named like a router is a router only if a mixture reads it."""

    def rewrite(self, model: ir.Model, _: Weights) -> bool:
        """Write the groups of the weights that lack one."""
        modified = False
        for value in model.graph.initializers.values():
            group = group_of(value)
            if group == "other" or contract.GROUP_METADATA in value.metadata_props:
                continue
            routes = any(mixture_of(use.node) for use in value.uses())
            value.metadata_props[contract.GROUP_METADATA] = (
                "feed_forward" if group == "routers" and not routes else group
            )
            modified = True
        return modified
