"""The page as people meet it: the real command, and a real browser that looks at it."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_SECONDS = 90
PATIENCE_SECONDS = 60
"""For what the page is to show, on a machine that does something else."""


@contextmanager
def served(release: Path, *options: str) -> Iterator[str]:
    """The address of `python -m sample.app`, while the context lasts."""
    port = free_port()
    command = [sys.executable, "-m", "sample.app", "--release", str(release), "--port", str(port), *options]
    process = subprocess.Popen(command)
    try:
        _await(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browsing(url: str, width: int = 1120, height: int = 860) -> Iterator[Page]:
    """The page in Chromium, loaded. CHROMIUM must not be None."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        expect.set_options(timeout=1000 * PATIENCE_SECONDS)
        page.goto(url)
        page.wait_for_selector("#draw")
        yield page
        browser.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _await(port: int, process: subprocess.Popen) -> None:
    give_up = monotonic() + START_SECONDS
    while process.poll() is None and monotonic() < give_up:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        sleep(0.1)
    raise RuntimeError("the page did not start")
