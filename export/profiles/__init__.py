"""Joins graphs of a bundle. Each joined graph maps features, samples or bytes to log-probabilities or text.

Needs onnx-ir, not torch.
"""
