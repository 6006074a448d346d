"""Recipes: what they may contain, and reading, overriding and checking them."""
