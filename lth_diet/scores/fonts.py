"""Fonts that draw class names in any script."""

import functools
import logging
from collections.abc import Sequence

from matplotlib import font_manager

_PLACEHOLDERS = "Last Resort"  # has every character, and draws each as a box


def drawable_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Class names that matplotlib can draw with the fonts of this machine.

    Args:
        names: Class names, in the order of their labels.

    Returns:
        The names, with `class <label>` in place of each that no font can draw, and the font families to use.
    """
    families, missing = _families(frozenset("".join(names)))
    labels = [f"class {label}" if missing.intersection(name) else name for label, name in enumerate(names)]
    return labels, list(families)


@functools.cache
def _families(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Font families that have these characters, the default first, and the characters that no font has."""
    default = font_manager.FontProperties()
    families = list(default.get_family())
    missing = characters - _characters(font_manager.findfont(default))
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # names each weight that it does not find
    for name in sorted({font.name for font in font_manager.fontManager.ttflist if _PLACEHOLDERS not in font.name}):
        if not missing:
            break
        found = _characters(font_manager.findfont(font_manager.FontProperties(family=name)))
        if missing & found:
            families.append(name)
            missing -= found
    return tuple(families), missing


def _characters(path: str) -> frozenset[str]:
    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
