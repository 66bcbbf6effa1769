"""N-gram language models: reading, compact files, training, and their scores inside the search."""
