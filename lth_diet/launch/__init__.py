"""Launches a recipe: command line, validation, processes, progress on the screen.

May import the packages listed earlier in the map of CONTRIBUTING.md: all but sweep.
"""
