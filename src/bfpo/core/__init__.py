"""Values that every part shares: pairs, samples and verdicts, files, the terminal."""
