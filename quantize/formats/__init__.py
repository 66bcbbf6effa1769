"""How weights become those of each format, and layers those that read them."""
