"""What can be measured of a story's video: `base` says what a measure is, `registry` which ones run, and each has a file."""
