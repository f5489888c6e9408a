"""A web page on this machine: draw, edit and chat with a release.

The page answers to 127.0.0.1 alone, shares nothing, asks no other machine for anything, and keeps its files until it ends.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import tyro

from sample.cli import run
from sample.hosts import is_loopback

HOST = "127.0.0.1"
UPLOAD = "20mb"
VISITORS = 64  # of whom anything is remembered
# the browser itself refuses whatever would leave this machine, and to show the page inside another one
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw, edit and chat in the browser."""

    release: Path
    """The release folder to work with."""
    port: int = 7860
    """Where the page is, on 127.0.0.1."""
    seconds: float = 300.0
    """The longest that one drawing or answer may take."""


def main(argv: list[str] | None = None) -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    args = tyro.cli(Args, args=argv)
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port {args.port} is not a port; give 1 to 65535")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, files and all
    with serving(args) as page:
        print(f"the page is at {page.local_url} (Ctrl-C ends it)", flush=True)
        Event().wait()


@contextmanager
def serving(args: Args) -> Iterator[Any]:
    """The page (`gradio.Blocks`), served while the context lasts.

    Raises:
        ValueError: the release cannot be loaded, gradio is missing, or the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="querybridge-") as files:
        quiet(Path(files))
        try:
            from sample.page import build, look
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise ValueError("the page needs gradio; pip install -e '.[app]'") from error
        from starlette.middleware import Middleware

        from sample.jobs import Jobs
        from sample.page_conversations import Conversations
        from sample.pipeline import Pipeline
        from sample.studio import Studio

        with closing(Jobs(args.seconds)) as jobs:
            studio = Studio(Pipeline.from_release(args.release), jobs)
            page = build(studio, Conversations(studio, Path(files)))
            try:
                page.launch(
                    server_name=HOST,
                    server_port=args.port,
                    share=False,
                    allowed_paths=[],
                    max_file_size=UPLOAD,
                    state_session_capacity=VISITORS,
                    footer_links=[],
                    run_history=False,
                    enable_monitoring=False,
                    ssr_mode=False,
                    mcp_server=False,
                    quiet=True,
                    prevent_thread_lock=True,
                    app_kwargs={"middleware": [Middleware(Sealed)], "docs_url": None, "redoc_url": None},
                    **look(),
                )
            except OSError as error:
                raise ValueError(f"--port {args.port} cannot be had; give another") from error
            try:
                yield page
            finally:
                page.close(verbose=False)


def quiet(files: Path) -> None:
    """Tells gradio, before it is imported, to keep its files in a folder of ours and to report to nobody. What else the
    environment says could open the page: it has no say."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(files)


class Sealed:
    """Puts the policy above on every answer, and answers this machine alone, by its own name (ASGI)."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        host = next((value for name, value in scope.get("headers", ()) if name == b"host"), b"localhost")
        if scope["type"] == "http" and not is_loopback(host):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("this page is for this machine alone, by its own name", 403)(scope, receive, sealed)
            return
        await self.app(scope, receive, sealed)


if __name__ == "__main__":
    sys.exit(run(main))
