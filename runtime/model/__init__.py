"""The model on arrays: features, graphs in onnxruntime sessions, and the encoder's caches."""
