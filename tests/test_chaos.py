"""Every row of the fault catalogue with few trials, in one process beside this one; `make chaos` plays them in full."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.chaos.catalogue import ROWS
from tests.chaos.page import page
from tests.chaos.rows import Outcome
from tests.two_ranks import ROOT


def outcomes() -> dict[str, Outcome]:
    """What the fast rows come to."""
    path, said = played()
    assert path.is_file(), said[-3000:]
    return {name: Outcome(**held) for name, held in json.loads(path.read_text()).items()}


@functools.cache
def played() -> tuple[Path, str]:
    """Where the outcomes are, and what was said; once, whether it went well or not."""
    path = Path(tempfile.mkdtemp(prefix="chaos-")) / "outcomes.json"
    command = ["timeout", "3600", sys.executable, "-m", "tests.chaos", "--fast", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return path, done.stdout


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.fast])
def test_nothing_is_lost(name):
    outcome = outcomes()[name]
    assert outcome.trials
    assert not outcome.lost


def test_the_page_counts_and_lists_what_is_lost():
    found = {name: Outcome(trials=3, seen="2 ms") for name in ROWS}
    assert "Nothing" in page(found)
    found["C3"] = Outcome(trials=200, lost=["bit 7 was not | noticed"])
    text = page(found)
    assert "| C3 | a bit flips in a checkpoint |" in text
    assert "| 200 | 199 | 1 |" in text
    assert "- C3: bit 7 was not | noticed" in text
    assert all(f"| {name} |" in text for name in ROWS)
