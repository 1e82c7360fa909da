"""Sums reports: over the ranks of one step (`merge`), and over successive generations (`concatenate`).

Each field of a report declares in its metadata how it adds up in both cases, as functions of the reports and the
field's name:

    num_forwards: int = field(metadata=adds(largest, steps=total))

A mean is weighted by the count it was taken over, so that the sum's mean is the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Report = TypeVar("Report", bound="DataclassInstance")
Reducer = Callable[[Sequence[Any], str], Any]
"""From reports, at least one, and the name of a field: that field's value in their sum."""
CURVE_POINTS = 64


def merge(reports: Sequence[Report]) -> Report:
    """Merge reports of ranks that generated the same step in parallel.

    Counts add up. Seconds and their breakdown are those of the slowest rank, because the trainer waits for it.

    Raises:
        ValueError: There are no reports, or they are of different steps, policy versions or modes.
    """
    return _reduced(reports, "ranks")


def concatenate(reports: Sequence[Report]) -> Report:
    """Concatenate reports of successive generations.

    Counts and seconds add up. Step, version and mode are those of the last report.

    Raises:
        ValueError: There are no reports.
    """
    return _reduced(reports, "steps")


def adds(ranks: Reducer, *, steps: Reducer | None = None) -> Mapping[str, Reducer]:
    """Metadata of a report's field: how to combine it over ranks, and over steps (the same way by default)."""
    return {"ranks": ranks, "steps": steps or ranks}


def _reduced(reports: Sequence[Report], over: str) -> Report:
    if not reports:
        raise ValueError("at least one report is needed")
    first = reports[0]
    return type(first)(**{field.name: field.metadata[over](reports, field.name) for field in fields(first)})


def total(reports: Sequence[Any], name: str) -> Any:
    """The sum."""
    return sum(_values(reports, name))


def largest(reports: Sequence[Any], name: str) -> Any:
    """The largest value."""
    return max(_values(reports, name))


def largest_known(reports: Sequence[Any], name: str) -> float | None:
    """The largest known value; None if none is known."""
    return max((value for value in _values(reports, name) if value is not None), default=None)


def total_if_all(reports: Sequence[Any], name: str) -> float | None:
    """The sum; None unless every report has a value."""
    values = _values(reports, name)
    return None if None in values else sum(values)


def largest_if_all(reports: Sequence[Any], name: str) -> float | None:
    """The largest value; None unless every report has one."""
    values = _values(reports, name)
    return None if None in values else max(values)


def last(reports: Sequence[Any], name: str) -> Any:
    """The value of the last report."""
    return getattr(reports[-1], name)


def of_slowest(reports: Sequence[Any], name: str) -> Any:
    """The value of the report with the largest `generate_s`, so that all seconds of a sum come from one rank."""
    return getattr(max(reports, key=lambda report: report.generate_s), name)


def same(reports: Sequence[Any], name: str) -> Any:
    """The value that all reports share; raises `ValueError` if they differ."""
    values = _values(reports, name)
    if len(set(values)) > 1:
        raise ValueError(f"reports of different {name} do not merge: {values}")
    return values[0]


def mean_over(count_name: str) -> Reducer:
    """The mean weighted by the field `count_name`; None if nothing was counted or no value is known."""

    def mean(reports: Sequence[Any], name: str) -> float | None:
        return _weighted_mean(zip(_values(reports, name), _values(reports, count_name), strict=True))

    return mean


def mean_by_key(counts_name: str) -> Reducer:
    """Per key of a dict, the mean weighted by that key of the dict `counts_name`; keys without a count are left out."""

    def means(reports: Sequence[Any], name: str) -> dict[str, float]:
        pairs = list(zip(_values(reports, name), _values(reports, counts_name), strict=True))
        keys = dict.fromkeys(key for values, _ in pairs for key in values)
        found = {key: _weighted_mean((values.get(key), counts.get(key, 0)) for values, counts in pairs) for key in keys}
        return {key: mean for key, mean in found.items() if mean is not None}

    return means


def rate_of_slowest(count_name: str) -> Reducer:
    """A rate over parallel ranks: the total of the field `count_name` over the seconds of the slowest report.

    None unless every report has a rate.
    """
    return _rate(count_name, max)


def rate_over(count_name: str) -> Reducer:
    """A rate over successive reports: the total of the field `count_name` over the seconds at each report's own rate.

    None unless every report has a rate.
    """
    return _rate(count_name, sum)


def _rate(count_name: str, together: Callable[[Iterable[float]], float]) -> Reducer:
    def rate(reports: Sequence[Any], name: str) -> float | None:
        rates, counts = _values(reports, name), _values(reports, count_name)
        if not all(rates):
            return None
        seconds = together(count / rate for count, rate in zip(counts, rates, strict=True))
        return sum(counts) / seconds if seconds else None

    return rate


def total_by_key(reports: Sequence[Any], name: str) -> dict[str, int]:
    """Sum of dicts of counts, key by key."""
    sums: dict[str, int] = {}
    for counts in _values(reports, name):
        for key, count in counts.items():
            sums[key] = sums.get(key, 0) + count
    return sums


def total_by_position(reports: Sequence[Any], name: str) -> tuple[int, ...]:
    """Sum of tuples of counts, position by position; a shorter tuple counts 0 past its end."""
    rows = _values(reports, name)
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(max(map(len, rows))))


def joined(reports: Sequence[Any], name: str) -> tuple[Any, ...]:
    """Concatenation of tuples."""
    return tuple(value for values in _values(reports, name) for value in values)


def distinct(reports: Sequence[Any], name: str) -> tuple[Any, ...]:
    """Concatenation of tuples, without duplicates."""
    return tuple(dict.fromkeys(joined(reports, name)))


def curves_side_by_side(reports: Sequence[Any], name: str) -> tuple[tuple[int, int], ...]:
    """Sum of step functions: a thinned curve holds its value until its next point, and is 0 after its last."""
    curves = [curve for curve in _values(reports, name) if curve]
    indices = sorted({index for curve in curves for index, _ in curve})
    return thin_curve([(index, sum(_value_at(index, curve) for curve in curves)) for index in indices])


def curves_in_turn(reports: Sequence[Any], name: str) -> tuple[tuple[int, int], ...]:
    """Concatenation of curves: each begins one index after the end of the previous one."""
    points: list[tuple[int, int]] = []
    for curve in _values(reports, name):
        offset = points[-1][0] + 1 if points else 0
        points += [(offset + index, active) for index, active in curve]
    return thin_curve(points)


def thin_curve(curve: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """At most `CURVE_POINTS` evenly spaced points of `curve`, including its first and last."""
    if len(curve) <= CURVE_POINTS:
        return tuple(curve)
    return tuple(curve[round(i * (len(curve) - 1) / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS))


def _values(reports: Sequence[Any], name: str) -> list[Any]:
    return [getattr(report, name) for report in reports]


def _value_at(index: int, curve: Sequence[tuple[int, int]]) -> int:
    """The value of a step function, given by its steps; 0 before the first and after the last."""
    if not curve[0][0] <= index <= curve[-1][0]:
        return 0
    return [value for begin, value in curve if begin <= index][-1]


def _weighted_mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in pairs if value is not None and weight]
    weights = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / weights if weights else None
