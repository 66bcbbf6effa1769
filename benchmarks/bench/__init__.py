"""The command `u2moe bench`: one module for each measurement, and the report as text."""
