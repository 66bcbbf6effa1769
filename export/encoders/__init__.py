"""The encoders that WeNet can train: their settings in train.yaml, their networks in torch, and their ONNX layers."""
