"""Models: loading and creating them, layouts of batches, log-probabilities, the reference, trained parameters."""
