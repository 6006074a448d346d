"""A small world with an oracle: what BFPO does, seen on a CPU in two minutes and without any download."""
