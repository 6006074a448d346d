"""Models: loading or making them, laying out batches, log-probabilities, the reference, what is trained."""
