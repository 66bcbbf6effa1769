"""Runs the model on arrays: computes features, runs graphs in onnxruntime sessions, and keeps the encoder's caches."""
