"""Fewer graphs than a bundle has, for programs that want one: samples or bytes in, log-probabilities or text out.

Needs onnx-ir, and torch only for a source that is a checkpoint.
"""
