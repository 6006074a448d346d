"""A small synthetic world with an exact judge, to train and evaluate on a CPU in minutes without any download."""
