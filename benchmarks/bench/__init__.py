"""What `u2moe bench` is: one question per file, its report as text and as plots."""
