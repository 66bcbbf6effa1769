"""Code shared by studies: models with random weights, other recognisers, servers, and the command line."""
