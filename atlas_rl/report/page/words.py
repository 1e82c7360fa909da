"""Formats numbers as text."""

from __future__ import annotations


def amount(value: float) -> str:
    """A number as text, with at least three digits and no exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def counted(number: int, what: str) -> str:
    """A count with its noun, such as "1 step" or "3,000 steps"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def were(number: int, what: str) -> str:
    """A count with its noun and verb, such as "1 step was" or "2 steps were"."""
    return f"{counted(number, what)} {'was' if number == 1 else 'were'}"
