"""Tasks of lm-evaluation-harness in a suite, and our suites as tasks for it."""
