"""Makes the page: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any

from atlas_rl.report.page import drafting, evidence, speed
from atlas_rl.report.page.figures import Figure, Panel, Table, height_px
from atlas_rl.report.page.headline import Headline, headline, side_by_side
from atlas_rl.report.page.reading import Run
from atlas_rl.report.page.words import counted

PANELS: tuple[Callable[[Sequence[Run]], Panel], ...] = (
    evidence.warnings,
    speed.tokens_per_s,
    speed.gain,
    speed.accepted_length,
    speed.seconds,
    drafting.speculators,
    drafting.by_position,
    drafting.entropy,
    speed.long_tail,
    drafting.calibration,
    evidence.audit,
)
"""In the page's order."""
BEGINNING = '<!DOCTYPE html>\n<html lang="en" data-made-by="atlas_rl">'
"""Of every page; by it the command knows a file that it may replace."""
_PAPER_PX, _PHONE_PX = 620, 280  # width of legends on paper, and on a narrow phone
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""The page holds all that it needs: a browser may fetch nothing for it."""


def page(runs: Sequence[Run], plotly_js: str, made_at: str) -> str:
    """The page of one or several runs.

    Args:
        runs: At least one run.
        plotly_js: Source of plotly.js.
        made_at: Date and time, for the foot.
    """
    panels = [make(runs) for make in PANELS]
    names = ", ".join(run.name for run in runs)
    num_steps = counted(sum(len(run.steps) for run in runs), "step")
    figures = [part for panel in panels for part in panel.parts if isinstance(part, Figure)]
    ids = {id(figure): f"figure-{i}" for i, figure in enumerate(figures)}
    body = "\n".join(
        [
            f"<header><h1>Rollouts of {escape(names)}</h1></header>",
            _headlines(runs),
            _contents(panels),
            *(_panel(panel, ids) for panel in panels),
            f"<footer>Made by atlas_rl at {escape(made_at)} from {num_steps}.</footer>",
        ]
    )
    drawn = {ids[id(figure)]: {"data": _plain(figure.data), "layout": _plain(figure.layout)} for figure in figures}
    return "\n".join(
        [
            BEGINNING,
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',  # keeps the browser from requesting one
            f"<title>{escape(names)}: rollouts</title>",
            f"<style>{_resource('page.css')}</style></head><body>",
            f"<main>{body}</main>",
            f"<script>{plotly_js}</script>",
            f'<script type="application/json" id="figures">{_json(drawn)}</script>',
            f"<script>{_resource('page.js')}</script>",
            "</body></html>\n",
        ]
    )


def _resource(name: str) -> str:
    return resources.files("atlas_rl.report.page").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON in which nothing can close the surrounding script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Part of a figure with tags escaped: plotly would show a run called <b> in bold."""
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _headlines(runs: Sequence[Run]) -> str:
    tops = [headline(run) for run in runs]
    if len(tops) == 1:
        return f'<section id="headline" class="top">{_tiles(tops[0])}{_said(tops[0])}</section>'
    table = _table(side_by_side(runs))
    said = "".join(f"<h3>{escape(top.name)}</h3>{_said(top)}" for top in tops)
    return f'<section id="headline" class="top">{table}{said}</section>'


def _tiles(top: Headline) -> str:
    tiles = "".join(
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="remark">{escape(remark)}</div></div>'
        for label, value, remark in top.tiles
    )
    return f'<div class="tiles">{tiles}</div>'


def _said(top: Headline) -> str:
    first, *others = top.verdict
    lines = f'<p class="verdict">{_inline(first)}</p>' + (f"<p>{_inline(' '.join(others))}</p>" if others else "")
    notes = "".join(f"<li>{escape(note)}</li>" for note in top.notes)
    return lines + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _contents(panels: Sequence[Panel]) -> str:
    links = "".join(f'<a href="#{panel.key}">{escape(panel.title)}</a>' for panel in panels)
    return f"<nav>{links}</nav>"


def _panel(panel: Panel, ids: dict[int, str]) -> str:
    parts = "".join(
        _table(part) if isinstance(part, Table) else _figure(part, ids[id(part)], panel.title) for part in panel.parts
    )
    absent = f'<p class="absent">{escape(panel.absent)}</p>' if panel.absent else ""
    text = f'<h2>{escape(panel.title)}</h2><p class="sentence">{escape(panel.sentence)}</p>'
    return f'<section id="{panel.key}">{text}{parts}{absent}</section>'


def _figure(figure: Figure, name: str, title: str) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    label = escape(figure.caption or title, quote=True)
    heights = f"--wide:{height_px(figure, _PAPER_PX)}px;--narrow:{height_px(figure, _PHONE_PX)}px"
    chart = f'<div class="chart" id="{name}" role="img" aria-label="{label}" style="{heights}"></div>'
    return f"<figure>{caption}{chart}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{_inline(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _inline(text: str) -> str:
    """Text as HTML; text between backticks becomes code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
