"""Parts of `benchmarks/gpu.py`: each has a function `cases` that returns its cases in order of importance."""
