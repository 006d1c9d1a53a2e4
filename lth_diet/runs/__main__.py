"""Alias of `python -m lth_diet`, kept for old scripts."""

from lth_diet.__main__ import main
from lth_diet.program import run_program

if __name__ == "__main__":
    run_program(main)
