"""Measures multi-scene videos from any source: `python -m mask2dit.evaluation CONFIG.yaml [key=value …]`."""
