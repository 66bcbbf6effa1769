"""A billion parameters in experts beside dense networks of 225 million and a billion."""
