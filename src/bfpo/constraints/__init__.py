"""Constraints such as "at most 2 % unsafe": the setting that meets them, from scored samples of the base model."""
