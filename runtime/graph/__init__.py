"""Building, reading and saving ONNX graphs with onnx-ir, for export and quantize. The runtime does not import it."""
