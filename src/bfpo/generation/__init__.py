"""Engines that answer prompts: a model in this process or on a server, a file of completions, a script."""
