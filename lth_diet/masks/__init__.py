"""Masks, which say which weights remain, and pruning rules.

May import errors.
"""
