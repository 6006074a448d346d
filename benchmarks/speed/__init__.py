"""Modules of `benchmarks/step_speed.py`."""
