"""Images and labels: datasets, batches, label noise, subsets, and the seeds of all random streams.

May import errors and files.
"""
