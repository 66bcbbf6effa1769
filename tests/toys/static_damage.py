"""Bundles with a file that does not match the others. Digests are valid."""

import json
import shutil

import numpy as np
import onnx_ir as ir

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


def edited_model(edit):
    """Return a function that changes the model in the manifest."""

    def change(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        edit(content["model"])
        file.write_text(json.dumps(content), encoding="utf-8")

    return change


def edited_form(**fields):
    """Return a function that changes fields of the form in the manifest."""
    return edited_model(lambda model: model["static"].update(fields))


def edited_cache(index, **fields):
    """Return a function that changes fields of a cache in the manifest."""
    return edited_model(lambda model: model["caches"][index].update(fields))


def is_half(name):
    """Return a function that changes an input to float16."""
    return with_input(name, "Cast", None, ir.DataType.FLOAT16, to=1)


DAMAGED_SHAPES = [
    (
        "static.onnx",
        with_input("mask", "Concat", (1, 1, 1, 24), axis=3),
        ("input mask: axis 48 is 24, expected 48", r"static.onnx: input mask: is float32 \[1, 1, 1, 24\], expected"),
    ),
    (
        "static.onnx",
        is_half("att_cache"),
        (
            r"input att_cache: type is tensor\(float16\), expected tensor\(float\)",
            "static.onnx: input att_cache: is not float32, expected float32",
        ),
    ),
    (
        "cnn_cache0.npy",
        lambda file: np.save(file, np.zeros((1, 42, 64))),
        (
            "cnn_cache0.npy: found float64",
            "cnn_cache0.npy: is not a numpy array with {'descr': '<f4', 'fortran_order': F",
        ),
    ),
    (
        "bundle.json",
        edited_form(histories=[]),
        (
            r"static: histories must have a step per block: expected {'cnn_cache': \d+}, got {}",
            "bundle.json: model: static: histories: expected a step per block of cnn_cache",
        ),
    ),
    (
        "bundle.json",
        edited_form(num_left_chunks=0),
        ("num_left_chunks must be at least 1, got 0", "bundle.json: model: static: num_left_chunks: found 0"),
    ),
    ("cnn_cache0.npy", lambda file: file.write_bytes(b"none"), ("cnn_cache0.npy: is not a numpy array",) * 2),
    (
        "bundle.json",
        edited_cache(1, shape=[64]),
        (
            r"static: shape of cnn_cache must be \[channels, frames\] or \[heads, 0, width\], got \[64\]",
            r"bundle.json: model: caches: 1: shape: found an array, expected \[channels, frames\] or \[h",
        ),
    ),
    (
        "bundle.json",
        edited_cache(0, rate=40),
        (
            "rate of att_cache must be at most 1, got 40",
            "bundle.json: model: caches: 0: rate: found 40, expected",
        ),
    ),
    (
        "bundle.json",
        edited_cache(1, shape=[1 << 20, 1 << 20]),
        (
            "a cache may have at most 268435456 numbers, got .* in cnn_cache",
            "bundle.json: model: caches: 1: shape: found an array, expected at most 268435456 numbers in a cache",
        ),
    ),
    (
        "bundle.json",
        edited_model(lambda model: model.update(frame_reduction=9)),
        (
            "frame_reduction must be at most subsampling_rate, 4, got 9",
            "bundle.json: model: frame_reduction: found 9, expected an integer from 1 to 4",
        ),
    ),
    (
        "bundle.json",
        edited_form(num_left_chunks=10000, rates=[{"step": 1, "positions": "p"}], frequencies=[1.0] * 2000),
        ("expected .*'mask', 'p', 'att_cache", "bundle.json: model: static: input p is float32 .*, which is too large"),
    ),
]
"""The file, its change, and the messages of Python and C++."""
