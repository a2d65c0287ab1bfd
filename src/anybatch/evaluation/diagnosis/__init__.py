"""Diagnosis of the batch norms of a network: which of them suffer from the batch size."""
