"""Which norms of a network suffer from their batch size."""
