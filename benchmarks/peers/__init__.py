"""Other runtimes, other graphs and other recognisers beside ours."""
