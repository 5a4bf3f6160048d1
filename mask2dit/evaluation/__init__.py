"""Measuring multi-scene videos, whoever made them: `python -m mask2dit.evaluation CONFIG.yaml [key=value …]`."""
