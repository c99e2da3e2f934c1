"""Words behind a value: units, which are dropped, and words that belong to the value."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "inch": "in inches", "foot": "ft feet", "yard": "yd", "mile": "mi", "mg": "milligram", "g": "gram gm", "kg": "kilogram",
    "pound": "lb", "ounce": "oz", "second": "s sec", "minute": "min", "hour": "h hr", "day": "", "week": "", "month": "",
    "year": "yr", "dollar": "", "cent": "", "radian": "rad", "l": "liter litre", "ml": "milliliter millilitre",
    "gallon": "gal", "mph": "", "newton": "n", "joule": "j", "watt": "w", "kelvin": "k", "volt": "v",
}  # fmt: skip
_KNOWN = {name: unit for unit, others in _NAMES.items() for name in (unit, *others.split())}
_SHAPES = ("square", "cubic", "sq", "cu")
_SYMBOLS = frozenset("msglLhNJWKVCF")
_FACTORS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that make another value of a number, or a sentence: what has one of them is no unit.
_NO_UNIT = frozenset(
    """or and more less than least most fewer greater over under above below north south east west northeast northwest southeast
    southwest clockwise counterclockwise anticlockwise is are was were be not no if when except excluding minus plus negative
    squared cubed mod modulo factorial remainder half halves third thirds quarter quarters tenth tenths gross score wrong right
    correct incorrect both either neither to from between approximately about roughly nearly at but maybe false true none
    undefined infinity infinite pi sqrt sin cos tan log exp theta alpha beta gamma phi omega lambda base percent
    percentage""".split()
)
_SIDES = ("left", "up", "down")  # directions where they stand alone: 5 apples left are 5
_WORDS = re.compile(r"[A-Za-z]+(?:\.(?=[A-Za-z.]|$))?|\S")


def factor_of(words: str) -> tuple[int, str]:
    """The factor that words begin with, and the rest of them: ``6 million dollars`` is 6 times (1000000, "dollars").

    >>> factor_of(" million dollars "), factor_of("cm")
    ((1000000, 'dollars'), (1, 'cm'))
    """
    first, _, rest = words.strip().partition(" ")
    name = first.lower().removesuffix("s")
    return (_FACTORS[name], rest.strip()) if name in _FACTORS else (1, words.strip())


def is_unit(words: str, upright: bool) -> bool:
    """Return whether words are a unit or a counted thing.

    Args:
        upright: they are marked as text. Bare letters are variables as a rule: then each must be a known unit, or long.
    """
    found = [word.rstrip(".") for word in _WORDS.findall(words)]
    found = [word for word in found if word not in ("/", "-", "")]
    if not found or len(found) > 5 or found[0].lower() in _SIDES:
        return False
    return all(_names_unit(word, upright) for word in found)


def _names_unit(word: str, upright: bool) -> bool:
    lower = word.lower()
    if not word.isalpha() or lower in _NO_UNIT or lower.removesuffix("s") in _FACTORS:
        return False
    if len(word) == 1:
        return upright and (word in _SYMBOLS or lower == "a")
    return upright or unit_of(word) != "" or lower in _SHAPES or (len(word) > 3 and re.search("[aeiouy]", lower) is not None)


def unit_of(words: str) -> str:
    """The unit's name, one for all its spellings; nothing where it is none of the common ones.

    >>> unit_of("square centimeters"), unit_of("cm"), unit_of("apples")
    ('cm', 'cm', '')
    """
    left = [word for word in re.findall("[a-z]+", words.lower()) if word not in _SHAPES]
    if len(left) != 1:
        return ""
    return _KNOWN.get(left[0]) or _KNOWN.get(left[0].removesuffix("s"), "")
