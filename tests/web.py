"""A web server of a folder, in a thread: with byte ranges, and with faults on demand."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web


class Web:
    """Serves `folder` at `url`; counts requests by name, and answers the next `failing` of them with 503."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, ""
        self.asked: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.failing = 0
        self.whole = False  # forget that ranges were asked for
        self.signed = ""  # what alone a signature is for

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked[name] += 1
        if self.failing:
            self.failing -= 1
            return web.Response(status=503)
        if self.signed and name != self.signed:
            return web.Response(status=403)
        if not (self.folder / name).is_file():
            return web.Response(status=404)
        if "Range" in request.headers and request.method == "GET":
            self.ranges.append((name, request.headers["Range"]))
        if self.whole:
            return web.Response(body=(self.folder / name).read_bytes())
        return web.FileResponse(self.folder / name)


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """The server on a free port of this machine."""
    served, loop = Web(folder), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/{name:.*}", served.answer)
    runner = web.AppRunner(app)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
