"""Names of layers, from those of the nodes that the exporter writes."""

from __future__ import annotations

import re

import onnx_ir as ir

_PART = re.compile(r".*?\.\d+\.[^.]+")


def scope(node: ir.Node) -> str:
    """The scope of a node's name, dotted as in a state dict."""
    return (node.name or "").rsplit("/", 1)[0].replace("/", ".")


def layer_of(node: ir.Node) -> str:
    """The layer of a call, as recipes and reports name it.

    Within a block it is a part of the block, such as `encoder.encoders.3.self_attn` with all its projections; elsewhere
    the call's scope.
    """
    name = scope(node)
    found = _PART.match(name)
    return found[0] if found else name
