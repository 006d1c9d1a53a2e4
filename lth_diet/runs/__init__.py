"""Run directories: layout, state, verification, export, and synchronization with object stores.

May import everything up to config.
"""
