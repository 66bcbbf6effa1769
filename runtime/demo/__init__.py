"""Data of the demo model. u2moe finds the data through this package."""
