"""One Composer training: what it is built from, the Trainer, its callbacks, and its progress.

May import everything up to runs.
"""
