"""Numbers with intervals from prompts, completions and verdicts."""
