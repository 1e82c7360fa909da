"""Numbers as text."""

from __future__ import annotations


def amount(value: float) -> str:
    """A number as text: three digits at least, never with an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def counted(number: int, what: str) -> str:
    """A number of things, such as "1 step" and "3,000 steps"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def were(number: int, what: str) -> str:
    """A number of things and its verb, such as "1 step was" and "2 steps were"."""
    return f"{counted(number, what)} {'was' if number == 1 else 'were'}"
