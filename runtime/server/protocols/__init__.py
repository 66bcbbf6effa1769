"""Protocols of clients: one file each, and the table of all."""
