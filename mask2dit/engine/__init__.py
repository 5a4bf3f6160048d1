"""Runs the stages of curation, caching and evaluation: in this process, in several processes, or on a Ray cluster."""
