"""Inference from a configuration to a video file with its contact sheet and record, as the example scripts run it."""
