"""Many runs: a grid, the plan of what is left, and a scheduler on Ray.

May import everything else.
"""
