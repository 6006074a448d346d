"""Conversion of configuration files of other training stacks to recipes, with an outcome for every key."""
