"""The attention of streamed blocks, between its projections, as one call, which native kernels replace."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.quantize.passes.rewrite import Rewrite, new_call, only_reader, present
from u2moe.quantize.weights import Weights
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.attention import Heads, cached_attention
from u2moe.runtime.graph.file import array_of

CACHE = "att_cache"


class GroupAttention(Rewrite):
    """Afterwards each block reads the cache of keys and values in one call. The numbers stay what they are."""

    def rewrite(self, model: ir.Model, _: Weights) -> bool:
        """Replace what stands between the projections of each block that reads the cache."""
        readers = list(_readers(model))
        for gather in readers:
            _group(model, gather)
        RemoveUnusedNodesPass()(model)
        return bool(readers)

    def ensures(self, model: ir.Model) -> None:
        """No block reads the cache otherwise."""
        for gather in _readers(model):
            raise ir.passes.PostconditionError(f"node {gather.name}: reads {CACHE}")


def _readers(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that take a block's keys and values from the cache."""
    for node in model.graph:
        if node.op_type == "Gather" and present(node, 0).name == CACHE:
            yield node


def _group(model: ir.Model, gather: ir.Node) -> None:
    both = only_reader(gather)
    own = present(both, 1)
    sliced = next((use.node for use in own.uses() if use.node.op_type == "Slice"), None)
    if sliced is None:
        raise BundleError(f"node {gather.name}: the keys and values of the chunk are not kept")
    key_value, shape = _before_heads(own)
    kept, split = only_reader(sliced), _split(both)
    keys, product = (next(iter(value.uses())).node for value in split.outputs)
    positions = []
    if keys.op_type == "Add":
        positions = [_before_heads(present(keys, 1))[0]]
        keys = only_reader(keys)
    scores = only_reader(keys)
    query, query_shape = _before_heads(present(scores, 0))
    end = only_reader(only_reader(product))
    if (scores.op_type, product.op_type, end.op_type) != ("MatMul", "MatMul", "Reshape"):
        raise BundleError(f"node {split.name}: what follows is not attention as the exporter writes it")
    heads = Heads(num_heads=query_shape[2], num_kv_heads=shape[2], size=query_shape[3])
    function, attributes = cached_attention(heads, relative=bool(positions))
    bias = present(only_reader(scores), 1)
    inputs = [query, key_value, *(present(gather, index) for index in range(2)), present(sliced, 1), bias, *positions]
    call = new_call(model, function, gather, inputs, attributes)
    model.graph.insert_before(end, call)
    for before, after in zip((end.outputs[0], kept.outputs[0]), call.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(after)


def _split(both: ir.Node) -> ir.Node:
    """The node that separates keys from values, after heads that serve several others have been repeated."""
    uses = [use.node for use in both.outputs[0].uses()]
    for node in uses:
        if node.op_type == "Unsqueeze":
            return only_reader(only_reader(only_reader(node)))
    return uses[0]


def _before_heads(x: ir.Value) -> tuple[ir.Value, list[int]]:
    """The values [batch, time, heads * size] of x [batch, heads, time, size], and the shape between."""
    transpose = x.producer()
    reshape = transpose.inputs[0].producer() if transpose is not None and transpose.inputs[0] is not None else None
    if transpose is None or reshape is None or (transpose.op_type, reshape.op_type) != ("Transpose", "Reshape"):
        raise BundleError(f"{x.name}: is not divided into heads as the exporter does it")
    return present(reshape, 0), [int(size) for size in array_of(present(reshape, 1))]
