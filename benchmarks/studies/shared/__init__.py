"""What several studies use: models of random weights, other recognisers, servers, and the command line."""
