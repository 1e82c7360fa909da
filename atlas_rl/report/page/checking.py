"""Checks that a line of a report file is a report, so that damaged lines are counted and not drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args

from atlas_rl.report.report import Mode, StepReport

_FIELDS = {field.name: field for field in fields(StepReport)}
_DERIVED = {name for name, value in vars(StepReport).items() if isinstance(value, property)}
_MOST = 2**53  # larger whole numbers are not all floats; no figure of a run is as large


def report_of(row: Mapping[str, Any]) -> StepReport:
    """The report in a line.

    Drops keys that no report has: callers may add their own figures.

    Raises:
        ValueError: Fields are missing, of another type, out of range, or inconsistent.
    """
    required = [
        name for name, field in _FIELDS.items() if field.default is MISSING and field.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in row]:
        raise ValueError(f"no step report: it lacks {', '.join(missing)}")
    given = {name: row[name] for name in _FIELDS if name in row}
    for name, value in given.items():
        if not FORMS[str(_FIELDS[name].type)](value) or (_cannot_be_negative(name) and (value or 0) < 0):
            raise ValueError(f"no step report: its {name} is {_shown(value)}")
    report = StepReport.from_dict(given)
    if set(report.drafted) != set(report.accepted):
        raise ValueError("no step report: drafted and accepted name other speculators")
    if len(report.drafted_by_position) != len(report.accepted_by_position):
        raise ValueError("no step report: drafted and accepted have other positions")
    for name in _DERIVED:
        value = getattr(report, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"no step report: its {name} would be {value}")
    return report


def unknown_keys(row: Mapping[str, Any], origin: Collection[str]) -> set[str]:
    """Keys of a line that are neither a field, a derived figure nor one of `origin`."""
    return set(row) - set(_FIELDS) - _DERIVED - set(origin)


def _cannot_be_negative(name: str) -> bool:
    """Whether a field is a time or rate that cannot be negative. `other_s` can: it is a difference of clock readings."""
    return name.endswith("_s") and name != "other_s"


def _shown(value: Any) -> str:
    """A value on one short line; huge whole numbers are not written out."""
    if isinstance(value, int) and abs(value) > _MOST:
        return "too large"
    return f"{json.dumps(value):.60}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def _is_optional_number(value: Any) -> bool:
    return value is None or _is_number(value)


def _each(form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list | tuple) and all(map(form, values))


def _by_name(form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, dict) and all(map(form, values.values()))


def _is_point(value: Any) -> bool:
    return _each(_is_count)(value) and len(value) == 2


FORMS: Mapping[str, Callable[[Any], bool]] = {
    "int": _is_count,
    "float": _is_number,
    "float | None": _is_optional_number,
    "Mode": lambda value: value in get_args(Mode),
    "dict[str, int]": _by_name(_is_count),
    "dict[str, float]": _by_name(_is_number),
    "tuple[int, ...]": _each(_is_count),
    "tuple[str, ...]": _each(lambda value: isinstance(value, str)),
    "tuple[tuple[int, int], ...]": _each(_is_point),
}
"""By a field's annotation, whether a JSON value fits it."""
