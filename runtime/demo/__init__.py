"""Data of the demo model, which u2moe finds through this package."""
