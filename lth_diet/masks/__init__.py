"""Masks, and the rules that prune: which weights remain at a level.

May import errors.
"""
