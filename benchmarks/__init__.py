"""Measurements: one question per module, JSON out."""
