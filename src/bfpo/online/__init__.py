"""Online alignment: a policy samples, judges score the samples, and RLOO raises the combined value."""
