"""Quantization that knows a mixture of experts: a bundle in, another bundle out."""
