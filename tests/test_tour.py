"""The README's commands do what it says, and docs/tour.md shows them all."""

import re

from model.assets import ROOT
from tests.tour import commands, plan, tour


def test_the_page_shows_every_command_in_order():
    page = (ROOT / "docs" / "tour.md").read_text()
    assert re.findall(r"^\$ (.*)$", page, flags=re.MULTILINE) == commands((ROOT / "README.md").read_text())


def test_commands_are_told_from_remarks_and_other_languages():
    readme = "```\na b  # says\nlong \\\n  line\n\n# alone\n```\ntext\n```python\nx = 1\n```\n"
    assert commands(readme) == ["a b", "long line"]


def test_most_commands_are_run():
    planned = [plan(command) for command in commands((ROOT / "README.md").read_text())]
    assert sum(not one.why_not for one in planned) >= 30


def test_every_command_of_the_readme_works(tmp_path):
    failed = {one.command: one.output[-2000:] for one in tour(tmp_path / "tour") if one.code}
    assert not failed
