"""Tracking in MLflow, written from the run directories.

May import the packages listed earlier in the map of CONTRIBUTING.md: all up to runs.
"""
