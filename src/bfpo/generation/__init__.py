"""Answers from models: engines, and the file of completions that they fill."""
