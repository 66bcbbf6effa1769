"""The encoders that WeNet can train, a kind in a file: read from train.yaml, in torch, and as layers of a graph."""
