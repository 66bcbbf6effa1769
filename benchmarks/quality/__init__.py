"""What it does to words: calibration, hotwords, word times, levers."""
