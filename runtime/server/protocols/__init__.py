"""What clients speak: one file for each protocol, and the table of all."""
