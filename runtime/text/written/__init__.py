"""Rule-based inverse text normalization for English: digits for numbers, times, dates and money; sentence case."""
