"""Inverse text normalization for English by rules: digits for numbers, times, dates and money, and capitals."""
