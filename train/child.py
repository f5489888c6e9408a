"""One of our commands -> run in a process of its own, by those that are made of several."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def child(*command: str, remedy: str, cwd: Path | None = None) -> None:
    """`python -m COMMAND`, printed before it starts. Raises ValueError with the remedy when it ends with anything but 0.

    Ctrl-C, which a terminal sends to both, and SIGTERM, which is passed on, let it save and end first."""
    print("python -m", *command, flush=True)
    with subprocess.Popen([sys.executable, "-m", *command], cwd=cwd) as process:
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise ValueError(f"python -m {' '.join(command[:2])} did not finish; {remedy}")
