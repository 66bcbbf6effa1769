"""The choice of the experts' kernels by measurement. Only `choice` needs onnx; the rest runs with the runtime alone."""
