"""Bundles on disk: graphs, vocabulary and the manifest that describes them."""
