"""Measures -> a page of tables, so that no figure in docs/ is typed by hand.

    python -m sample.report docs/results.md "What the shipped release draws" scores.json

The page is written anew from its JSON files; each section names the command that made its file and the machine that ran it,
when NAME.command.txt and NAME.machine.txt lie beside it; NAME.note.txt says what follows from it, and NAME.picture.txt names
a picture to show. A folder of files becomes one table, a line for each.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from model.files import write_whole
from sample.cli import run
from sample.measures import Measure, interval_of, read_json, spans, value_of

CONTROLS = {"empty", "blank", "chance", "source"}
"""Parts of the names of measures of what is earned without looking: by an empty prompt, a blank picture, chance, or the
source picture left as it is."""


@dataclass(frozen=True)
class Args:
    """Write a page of tables from files that measuring commands wrote with --json."""

    page: Positional[Path]
    """The page to write, such as docs/results.md."""
    title: Positional[str]
    """Its first line."""
    files: Positional[tuple[Path, ...]]
    """JSON files of measures, one section each; or folders of them, whose measures are set side by side."""


def main(argv: list[str] | None = None) -> None:
    """Reads every file before it writes the page."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    if not args.files:
        raise ValueError("files: name at least one JSON file of measures")
    sections = [comparison(path) if path.is_dir() else section(path, read_json(path)) for path in args.files]
    text = f"# {args.title}\n\n" + "\n".join(sections)
    write_whole(args.page, lambda path: path.write_text(text))


def section(path: Path, measures: dict[str, Measure]) -> str:
    """One file as a heading, the command that made it, and a table."""
    rows = [f"| {name} | {value_of(m)} | {interval_of(m)} | {m.n} |" for name, m in measures.items()]
    return (
        f"## {path.stem}\n\n{_command(path)}| measure | value | {spans(measures.values())} | n |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def comparison(folder: Path) -> str:
    """The files of a folder side by side, with each measure that any of them holds; controls are left out.

    Raises:
        ValueError: the folder holds no file of measures.
    """
    files = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    if not files:
        raise ValueError(f"{folder} holds no .json file of measures; name a folder that a measuring command filled")
    held = dict.fromkeys(name for measures in files.values() for name in measures)
    names = [name for name in held if not CONTROLS & {*name.split(".")}]
    table = [["", *names], *([file, *(_cell(measures, name) for name in names)] for file, measures in files.items())]
    if len(names) > len(files):  # the longer side runs down the page
        table = [list(column) for column in zip(*table, strict=True)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines.insert(1, "|---" * len(table[0]) + "|")
    return f"## {folder.name}\n\n{_command(folder)}" + "\n".join(lines) + "\n"


def _command(path: Path) -> str:
    """The command that made a file, the machine that it ran on, what follows, and its picture's place beside the page, where
    they are noted beside it."""
    written = {"command": "`{}`", "machine": "{}", "note": "{}", "picture": f"![{path.stem}]({{}})"}
    notes = ((form, path.with_suffix(f".{kind}.txt")) for kind, form in written.items())
    return "".join(f"{form.format(note.read_text().strip())}\n\n" for form, note in notes if note.is_file())


def _cell(measures: dict[str, Measure], name: str) -> str:
    """The value and, where one is known, its interval."""
    if name not in measures:
        return ""
    interval = interval_of(measures[name])
    return value_of(measures[name]) + (f" ({interval})" if interval else "")


if __name__ == "__main__":
    sys.exit(run(main))
