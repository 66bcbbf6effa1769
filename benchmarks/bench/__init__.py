"""The command `u2moe bench`: one question per file, and its report as text."""
