"""Bundles with a file that does not match the others. Digests are valid."""

import shutil

import numpy as np
import onnx_ir as ir
from manifests import edit_manifest

from u2moe.runtime import Bundle
from u2moe.runtime.bundle_writer import write_manifest


def damaged(folder, target, file, change):
    """Return a copy of a bundle with a file changed and its digests recomputed."""
    shutil.copytree(folder, target)
    change(target / file)
    if file != "bundle.json":
        write_manifest(target, Bundle.open(folder).manifest)
    return target


def with_input(name, operator, axes=None, dtype=ir.DataType.FLOAT, **attributes):
    """Return a function that changes a graph to a valid one with another input of this name."""

    def change(file):
        model = ir.load(file)
        old = next(each for each in model.graph.inputs if each.name == name)
        sizes = axes or tuple(old.shape)
        node = ir.node(operator, [ir.val(name, dtype=dtype, shape=sizes)], attributes=attributes)
        if operator == "Concat":
            node = ir.node(operator, [node.inputs[0]] * 2, attributes=attributes)
        node.outputs[0].name = "changed"
        ir.convenience.replace_all_uses_with(old, node.outputs[0])
        model.graph.inputs[list(model.graph.inputs).index(old)] = node.inputs[0]
        model.graph.insert_before(model.graph[0], node)
        ir.save(model, file)

    return change


def shorter(name, axis):
    """Return a function that removes the last item of a graph's output on an axis. The graph declares no sizes."""

    def change(file):
        model = ir.load(file)
        index, old = next((index, each) for index, each in enumerate(model.graph.outputs) if each.name == name)
        bounds = [ir.node("Constant", [], attributes={"value_ints": [bound]}) for bound in (0, -1, axis)]
        cut = ir.node("Slice", [old, *(each.outputs[0] for each in bounds)])
        old.name, cut.outputs[0].name = "whole", name
        cut.outputs[0].type, cut.outputs[0].shape = old.type, ir.Shape([None] * len(old.shape))
        model.graph.outputs[index] = cut.outputs[0]
        model.graph.extend([*bounds, cut])
        ir.save(model, file)

    return change


SHORTER = [
    ("encoder", "output", 1), ("encoder", "output", 2), ("encoder", "r_att_cache", 4), ("encoder", "r_cnn_cache", 0),
    ("ctc", "log_probs", 2), ("decoder", "score", 2), ("decoder", "r_score", 1), ("decoder", "next_log_probs", 2),
]  # fmt: skip
"""Graphs, and outputs and axes to shorten."""


def in_model(edit, *messages):
    """Return a case with a changed description of the model; C++ also names the file and the section."""

    def change(file):
        edit_manifest(file.parent, lambda manifest: edit(manifest["model"]))

    return "bundle.json", change, (messages[0], f"bundle.json: model: {messages[1]}")


def in_form(*messages, **fields):
    return in_model(lambda model: model["static"].update(fields), *messages)


def in_cache(index, *messages, **fields):
    return in_model(lambda model: model["caches"][index].update(fields), *messages)


WRONG_MASK = "input mask: axis 48 is 24, expected 48", r"static.onnx: input mask: is float32 \[1, 1, 1, 24\], expected"
IS_HALF = (
    r"input att_cache: type is tensor\(float16\), expected tensor\(float\)",
    "static.onnx: input att_cache: is not float32, expected float32",
)
NOT_FLOAT32 = (
    "cnn_cache0.npy: found float64",
    "cnn_cache0.npy: is not a numpy array with {'descr': '<f4', 'fortran_order': F",
)
DAMAGED_SHAPES = [
    ("static.onnx", with_input("mask", "Concat", (1, 1, 1, 24), axis=3), WRONG_MASK),
    ("static.onnx", with_input("att_cache", "Cast", None, ir.DataType.FLOAT16, to=1), IS_HALF),
    ("cnn_cache0.npy", lambda file: np.save(file, np.zeros((1, 42, 64))), NOT_FLOAT32),
    ("cnn_cache0.npy", lambda file: file.write_bytes(b"none"), ("cnn_cache0.npy: is not a numpy array",) * 2),
    in_form(
        r"static: histories must have a step per block: expected {'cnn_cache': \d+}, got {}",
        "static: histories: expected a step per block of cnn_cache",
        histories=[],
    ),
    in_form("num_left_chunks must be at least 1, got 0", "static: num_left_chunks: found 0", num_left_chunks=0),
    in_form(
        "expected .*'mask', 'p', 'att_cache",
        "static: input p is float32 .*, which is too large",
        num_left_chunks=10000,
        rates=[{"step": 1, "positions": "p"}],
        frequencies=[1.0] * 2000,
    ),
    in_cache(0, "rate of att_cache must be at most 1, got 40", "caches: 0: rate: found 40, expected", rate=40),
    in_cache(
        1,
        r"static: shape of cnn_cache must be \[channels, frames\] or \[heads, 0, width\], got \[64\]",
        r"caches: 1: shape: found an array, expected \[channels, frames\] or \[h",
        shape=[64],
    ),
    in_cache(
        1,
        "a cache may have at most 268435456 numbers, got .* in cnn_cache",
        "caches: 1: shape: found an array, expected at most 268435456 numbers in a cache",
        shape=[1 << 20, 1 << 20],
    ),
    in_model(
        lambda model: model.update(frame_reduction=9),
        "frame_reduction must be at most subsampling_rate, 4, got 9",
        "frame_reduction: found 9, expected an integer from 1 to 4",
    ),
]
"""The file, its change, and the messages of Python and C++."""
