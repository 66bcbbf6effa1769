"""Corpora: lists, runs over them by many processes and machines, their results, and word errors."""
