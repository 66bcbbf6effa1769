"""Results as JSON files, and the scripts that write them into pages."""
