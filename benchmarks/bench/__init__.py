"""The command `u2moe bench`: one module for each measurement, and modules that print the report as text."""
