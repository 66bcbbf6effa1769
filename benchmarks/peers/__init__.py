"""Comparisons with other runtimes, other graphs and other recognisers."""
