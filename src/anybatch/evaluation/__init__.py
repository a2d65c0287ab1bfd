"""What is done to a trained network with data at hand."""
