"""Long work -> the same, with a bar on a terminal's standard error."""

import sys
from collections.abc import Callable, Iterable

Track = Callable[[Iterable], Iterable]
"""Gives on what it is given, and shows how far that is."""


def progress(what: str) -> Track:
    """A bar called `what`; none where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import track

    def watch(steps: Iterable) -> Iterable:
        return track(steps, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    return watch
