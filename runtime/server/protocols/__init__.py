"""Client protocols: one file each, and a table of all."""
