"""The JavaScript module. The server's page uses its microphone and resampler."""
