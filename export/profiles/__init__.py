"""Joins graphs of bundles: features, samples or bytes in, log-probabilities or text out. Needs onnx-ir, not torch."""
