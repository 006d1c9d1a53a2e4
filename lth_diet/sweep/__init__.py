"""Sweeps: many runs from a grid, the plan of what is left, and a scheduler on Ray.

May import everything else.
"""
