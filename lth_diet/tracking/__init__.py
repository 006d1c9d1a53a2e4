"""Tracking in MLflow, written from the run directories.

May import everything up to runs.
"""
