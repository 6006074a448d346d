"""The parts of `benchmarks/step_speed.py`."""
