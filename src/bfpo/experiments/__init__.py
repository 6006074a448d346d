"""Experiments: comparing methods over seeds on the testbed, and the quickstart."""
