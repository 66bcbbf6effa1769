"""Joins graphs of bundles. The joined graphs map features, samples or bytes to log-probabilities or text.

Needs onnx-ir, not torch.
"""
