"""Reading audio from any source as float32 samples of one channel at the model's sample rate."""
