"""Confidence intervals, plots, tables and pages for results of any kind."""
