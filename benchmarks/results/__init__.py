"""Results as JSON, and the scripts that turn them into pages. Measures nothing."""
