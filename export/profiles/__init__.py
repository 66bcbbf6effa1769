"""Joins graphs of a bundle, to map features, samples or bytes to log-probabilities or text. Does not need torch."""
