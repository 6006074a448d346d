"""Training: the stream plan, the trainers, and the work of `bfpo train` and `bfpo sft`."""
