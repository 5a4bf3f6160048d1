"""Measures of a story's video, one file each. `base` defines the interface, and `registry` selects those that run."""
