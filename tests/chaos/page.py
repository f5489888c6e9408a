"""Outcomes of rows -> the page that shows them."""

from data.interval import wilson
from tests.chaos.catalogue import ROWS
from tests.chaos.rows import Outcome

HEAD = """# Reliability

Every fault of the catalogue that a machine without a GPU can be given, and what became of it. Written by `make chaos`
(`python -m tests.chaos`): nothing here is typed by hand. A row's trials are counted, and those that went another way than
expected are lost and listed; `make test` plays the same rows with fewer trials.

Not here: R14 (a stored curve of losses, which holds for one version of torch on one kind of processor; C7, C8 and R11
compare runs with each other and with plain torch instead) and S15 (of a web page).

"""
GROUPS = {"C": "Checkpoints, resume, elasticity", "R": "Signals, hangs, numerics", "D": "Data", "S": "Security of inputs"}


def page(results: dict[str, Outcome]) -> str:
    """Markdown: a table for each group of rows, that of the elastic runs, and what was lost."""
    trials = sum(result.trials for result in results.values())
    lost = sum(len(result.lost) for result in results.values())
    text = HEAD + f"{len(results)} rows, {trials:,} trials, {lost:,} lost.\n"
    for letter, title in GROUPS.items():
        mine = [name for name in results if name.startswith(letter)]
        if not mine:
            continue
        text += f"\n## {title}\n\n" + table(
            ["", "fault", "expected", "target", "trials", "survived", "lost", "measured"],
            [line(name, results[name]) for name in mine],
        )
        for name in mine:
            if results[name].table:
                text += f"\n{name}, in figures:\n\n" + table(results[name].table[0], results[name].table[1:])
    text += "\n## Lost\n\n"
    sentences = [f"- {name}: {said}\n" for name, result in results.items() for said in result.lost[:5]]
    return text + ("".join(sentences) or f"Nothing. Of {trials:,} trials, with 95 % confidence under {bound(trials)} are.\n")


def line(name: str, result: Outcome) -> list[str]:
    """The cells of a row."""
    row = ROWS[name]
    count = f"{result.trials:,}", f"{result.trials - len(result.lost):,}", f"{len(result.lost):,}"
    return [name, row.fault, row.expected, row.target, *count, result.seen]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown's."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |\n" for cells in lines)


def bound(trials: int) -> str:
    """The highest share of losses that none in so many trials leaves likely."""
    return f"{100 * (1 - wilson(trials, trials)[0]):.2f} %"
