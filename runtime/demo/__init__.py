"""The demo model: a folder of data, which u2moe finds by the name of this package."""
