"""Scores of training examples: the EL2N formula, the file format, statistics and pictures.

May import errors, files and data.
"""
