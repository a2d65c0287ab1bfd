"""Looking at a network with data, and what is done to a trained one with them."""
