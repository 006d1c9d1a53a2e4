"""Masks (which weights remain) and pruning rules.

May import errors and networks.
"""
