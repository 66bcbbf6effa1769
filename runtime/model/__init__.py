"""Arrays in, arrays out: features, the graphs in their onnxruntime sessions, and the encoder's caches."""
