"""From the command line of a recipe to replicates that train: validation, processes, screen.

May import everything below sweep.
"""
