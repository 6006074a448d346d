"""Tasks of lm-evaluation-harness in suites, and the suites' tasks for lm-evaluation-harness."""
