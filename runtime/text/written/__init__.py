"""Spoken words as people write them: digits for numbers, times, dates and money, and capitals. English, by rule."""
