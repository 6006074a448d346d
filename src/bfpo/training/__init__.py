"""Training: the stream plan, the trainers, what a run tells, and the commands' work."""
