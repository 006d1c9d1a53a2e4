"""Alias of `python -m lth_diet`, kept for old scripts."""

import sys

from lth_diet.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
