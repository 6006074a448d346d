"""Guards: engines that wrap an engine, and answer safely by a judge or by a head on the model's states."""
