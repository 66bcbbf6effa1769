"""Converts bundles to fewer graphs: samples or bytes in, log-probabilities or text out. Needs onnx-ir, not torch."""
