"""`bfpo eval`: suites of published prompts put to a model, judged by several judges, scored, compared and gated."""
