"""The command `u2moe bench`: one file for each question, and the report as text."""
