"""Launches a recipe: command line, validation, processes, progress on the screen.

May import everything below sweep.
"""
