"""Judges, which decide whether an answer is safe or a refusal; fitting, evaluating and using them."""
