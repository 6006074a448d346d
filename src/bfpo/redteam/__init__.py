"""Preference pairs from your own model: prompts, samples, verdicts, pairs."""
