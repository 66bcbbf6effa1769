"""Shared by several studies: models of random weights, other recognisers, servers, and the command line."""
