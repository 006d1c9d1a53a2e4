"""One Composer training: builders of network and loaders, the Trainer, its callbacks, and its progress.

May import the packages listed earlier in the map of CONTRIBUTING.md: all up to tracking.
"""
