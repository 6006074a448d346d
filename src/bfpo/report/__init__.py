"""The page that shows what evaluations found, drawn from the runs' files alone."""
