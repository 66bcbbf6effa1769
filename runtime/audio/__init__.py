"""From anything that holds audio to float32 samples of one channel at the model's rate."""
