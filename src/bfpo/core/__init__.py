"""Values and tools shared by all packages: pairs, samples, verdicts, files, imports and the terminal."""
