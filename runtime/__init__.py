"""Recognise speech with a U2++ bundle: onnxruntime and numpy, neither torch nor onnx."""
