"""Client protocols, one per file, and a table of all protocols."""
