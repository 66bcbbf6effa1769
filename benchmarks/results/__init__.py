"""Results of measurements as JSON files, and scripts that write them into the pages of docs/."""
