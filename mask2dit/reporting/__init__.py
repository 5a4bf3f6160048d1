"""Intervals and plots of results, whatever they are of."""
