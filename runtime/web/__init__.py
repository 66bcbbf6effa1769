"""The JavaScript module; the page of the server has its microphone and resampler."""
