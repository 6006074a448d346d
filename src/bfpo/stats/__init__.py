"""Statistics as pure functions of numbers: intervals, paired tests, tails, agreement, corrections."""
