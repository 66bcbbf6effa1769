"""N-gram language models: reading, compact storage, training, and scoring within the search."""
