"""From samples to words: searches, hotwords, second pass, times, confidences and endpoints."""
