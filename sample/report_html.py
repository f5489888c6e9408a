"""Measures, what they were measured by, and pictures -> one page: a single file without scripts that can be mailed.

A measure of what is earned without looking (`CONTROLS`) stands in the line of the measure that it is a control of."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.preview import data_url
from sample.grid import Cell, Row
from sample.measures import Measure, interval_of, spans, value_of
from sample.report import CONTROLS
from sample.world_drawing import Judged
from sample.world_edits import Dialogue
from sample.world_edits import Judged as JudgedEdit

SHOWN = 12  # pictures of a section
SIDE = 256  # pixels along the longer side of a picture on the page, at most
LEGEND = (
    '<p class="soft">Bars run from 0 to 100 %: the value, and the interval that holds the true one with 95 % confidence. '
    "Thin marks are what a model that does not look would earn: by an empty prompt, a blank picture, chance, or the source "
    "picture left as it is.</p>"
)
STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #6a737d; --line: #e1e4e8; --right: #00794f; --wrong: #b83a22 }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1080px; margin: 2.5em auto;
  padding: 0 1.5em }
h1 { font-size: 1.7em; line-height: 1.25; margin: 0 0 .2em } h2 { font-size: 1.25em; margin: 2.2em 0 .6em }
h3 { font-size: 1em; margin: 1.6em 0 .5em } .soft, h3 small { color: var(--soft); font-weight: normal; font-size: .9em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; font-size: .85em; color: var(--soft) }
td, th { padding: .35em .9em .35em 0; border-bottom: 1px solid var(--line); vertical-align: baseline }
td.n, th.n { text-align: right; white-space: nowrap } td.track { width: 32% }
.bar { position: relative; height: 10px; background: #f2f4f6; border-radius: 5px; top: 1px }
.bar i { position: absolute; top: 0; bottom: 0; background: #a9c7ea; border-radius: 5px }
.bar b { position: absolute; top: -2px; bottom: -2px; width: 3px; margin-left: -1px; background: #1f5fa8 }
.bar u { position: absolute; top: 2px; bottom: 2px; width: 2px; background: #8b949e }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 18px 16px }
figure { margin: 0; font-size: .87em; line-height: 1.35 } figure img { width: 100%; display: block; border-radius: 4px;
  border: 3px solid var(--line); box-sizing: border-box }
figure.right img { border-color: var(--right) } figure.wrong img { border-color: var(--wrong) }
figcaption { margin-top: .35em } .right b { color: var(--right) } .wrong b { color: var(--wrong) }
code { font: .86em ui-monospace, monospace; overflow-wrap: anywhere }
td code { color: var(--ink) } table.told td:first-child { color: var(--soft); width: 14em }
@media print { figure, tr { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Section:
    """Pictures under one heading, each with its caption and, once judged, its verdict."""

    heading: str
    note: str
    rows: tuple[Row, ...]


def page(title: str, measures: Mapping[str, Measure], protocol: Mapping[str, Any], sections: Sequence[Section] = ()) -> str:
    """The whole page as HTML."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    sha256 = str(protocol.get("sha256", {}).get("release", ""))[:12]
    lede = _text(protocol.get("what", "")) + (f" Release <code>{sha256}</code>." if sha256 else "")
    parts = [
        f'{head}{view}<h1>{_text(title)}</h1><p class="soft">{lede}</p>',
        "<h2>Measures</h2>",
        LEGEND,
        *_tables(measures),
    ]
    if sections:
        parts += ["<h2>Pictures</h2>", *map(_section, sections)]
    parts += ["<h2>How it was measured</h2>", *_told(protocol)]
    return "\n".join(parts) + "</html>\n"


def world_figures(judged: Sequence[Judged]) -> list[Section]:
    """The first pictures of each category of each split, with their prompts and verdicts."""
    groups: dict[tuple[str, str], list[Judged]] = {}
    for one in judged:
        groups.setdefault((one.asked.split, one.asked.category), []).append(one)
    sections = []
    for (split, category), ones in groups.items():
        right = f"{sum(one.right for one in ones)} of {len(ones)} right"
        note = right + (f"; the first {SHOWN} shown" if len(ones) > SHOWN else "")
        rows = tuple(Row(one.asked.text, (Cell(one.picture, one.right),)) for one in ones[:SHOWN])
        sections.append(Section(f"{category.replace('_', ' ')}, {split}", note, rows))
    return sections


def edit_figures(judged: Sequence[JudgedEdit], dialogues: Sequence[Dialogue]) -> list[Section]:
    """The first of each kind of edit, what was given beside what was drawn; then conversations, picture after picture."""
    groups: dict[str, list[JudgedEdit]] = {}
    for one in judged:
        kind = one.ask.kind if one.ask.kind == one.ask.part else f"{one.ask.kind}: {one.ask.part}"
        groups.setdefault(kind, []).append(one)
    sections = []
    for kind, ones in groups.items():
        shown = ones[: SHOWN // 2]
        given = [Row("given", (Cell(one.source),) if one.source else ()) for one in shown]
        drawn = [Row(one.ask.turns[-1].text, (Cell(one.picture, one.verdict.whole),)) for one in shown]
        rows = tuple(row for pair in zip(given, drawn, strict=True) for row in pair)
        whole = sum(one.verdict.whole for one in ones)
        sections.append(Section(kind, f"{whole} of {len(ones)} whole; the first {len(shown)} shown", rows))
    for number, dialogue in enumerate(dialogues[:SHOWN], start=1):
        rows = tuple(Row(step.text, (Cell(picture, right),)) for step, picture, right in dialogue.steps)
        sections.append(Section(f"conversation {number}", "ends at the first picture that is not whole", rows))
    return sections


def _tables(measures: Mapping[str, Measure]) -> Iterator[str]:
    """A table for each group of measures, its controls beside what they control."""
    groups: dict[str, list[str]] = {}
    for name in measures:
        if not CONTROLS & {*name.split(".")}:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    for group, names in groups.items():
        controls = sorted({word for name in measures for word in _controls_of(name, group)})
        told = "".join(f'<th class="n">{_text(word)}</th>' for word in controls)
        yield (
            f'<h3>{_text(group)}</h3><table><tr><th>measure</th><th class="n">value</th><th></th>'
            f'<th class="n">{spans(measures.values())}</th><th class="n">n</th>{told}</tr>'
        )
        for name in names:
            last = name.rpartition(".")[2]
            beside = [measures.get(f"{group}.{word}.{last}") for word in controls]
            cells = "".join(f'<td class="n soft">{value_of(one) if one else ""}</td>' for one in beside)
            own = measures[name]
            yield (
                f'<tr><td>{_text(last.replace("_", " "))}</td><td class="n"><b>{value_of(own)}</b></td>'
                f'<td class="track">{_bar(own, [one for one in beside if one])}</td>'
                f'<td class="n">{interval_of(own)}</td><td class="n soft">{own.n}</td>{cells}</tr>'
            )
        yield "</table>"


def _controls_of(name: str, group: str) -> set[str]:
    before, _, _ = name.rpartition(".")
    head, _, word = before.rpartition(".")
    return {word} & CONTROLS if head == group else set()


def _bar(own: Measure, controls: Sequence[Measure]) -> str:
    """A share between 0 and 1 with its interval; thin marks where its controls are."""
    if own.unit != "share":
        return ""
    marks = "".join(f'<u style="left:{100 * one.value:.1f}%"></u>' for one in controls)
    low, high = (own.value if bound is None else bound for bound in (own.low, own.high))
    band = f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
    return f'<div class="bar">{band}{marks}<b style="left:{100 * own.value:.1f}%"></b></div>'


def _section(section: Section) -> str:
    figures = "".join(_figure(row.caption, cell) for row in section.rows for cell in row.cells)
    return f'<h3>{_text(section.heading)} <small>{_text(section.note)}</small></h3><div class="pictures">{figures}</div>'


def _figure(caption: str, cell: Cell) -> str:
    kind, mark = {None: ("", ""), True: ("right", "<b>&#10003;</b> "), False: ("wrong", "<b>&#10007;</b> ")}[cell.right]
    verdict = {None: "", True: ", right", False: ", wrong"}[cell.right]
    picture = f'<img src="{data_url(cell.picture, SIDE, "PNG")}" alt="{_text(caption)}{verdict}">'
    return f'<figure class="{kind}">{picture}<figcaption>{mark}{_text(caption)}</figcaption></figure>'


def _told(protocol: Mapping[str, Any]) -> Iterator[str]:
    """Every value of the protocol by its dotted name."""
    yield '<table class="told">'
    for name, value in _leaves(protocol):
        yield f"<tr><td>{_text(name)}</td><td><code>{_text(value)}</code></td></tr>"
    yield "</table>"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, f"{name}.{key}" if name else str(key))
    else:
        yield name, " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return html.escape(str(value))
