"""Builds, reads and saves ONNX graphs with onnx-ir, for export and quantize; the runtime itself never imports it."""
