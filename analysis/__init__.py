"""Reads MLflow, never trains."""
