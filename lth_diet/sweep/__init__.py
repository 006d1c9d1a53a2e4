"""Sweeps: many runs from a grid, the plan of what is left, and a scheduler on Ray.

May import the packages listed earlier in the map of CONTRIBUTING.md: all others.
"""
