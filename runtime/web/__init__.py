"""The JavaScript module. The server's page uses the microphone and the resampler of this module."""
