"""One of our commands -> run in a process of its own, by those that are made of several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def child(*command: str, remedy: str, cwd: Path | None = None) -> None:
    """`python -m COMMAND`, printed before it starts. Raises ValueError with the remedy when it ends with anything but 0."""
    print("python -m", *command, flush=True)
    if subprocess.run([sys.executable, "-m", *command], cwd=cwd, check=False).returncode:
        raise ValueError(f"python -m {' '.join(command[:2])} did not finish; {remedy}")
