"""Effects on recognition quality: calibration, hotwords, word times."""
