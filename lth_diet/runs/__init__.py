"""Run directories: layout, state, verification, export, and synchronization with object stores.

May import the packages listed earlier in the map of CONTRIBUTING.md: all up to config.
"""
