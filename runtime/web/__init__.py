"""The JavaScript module. The server's page uses the module's `Microphone` and `Resampler` classes."""
