"""The encoders that WeNet can train, one kind per module: read from train.yaml, in torch, and as layers of a graph."""
