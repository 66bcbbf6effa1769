"""Building, reading and saving ONNX graphs with onnx-ir, for export and quantize. Not imported by the runtime."""
