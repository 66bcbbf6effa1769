"""Measurements. Each module answers one question, and its results are JSON."""
