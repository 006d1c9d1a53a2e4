"""Run directories: what is stored where, what is finished, verification, export, and copies on an object store.

May import everything up to config.
"""
