"""From a configuration to a video file with its contact sheet and its record: what the example scripts call."""
