"""Who gets in, with how much, and what is counted of it: around the routes of a server."""

import asyncio
import hmac
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from sample.api import Refused
from sample.hosts import is_loopback
from sample.limits import Limits
from sample.worker import Worker

log = logging.getLogger(__name__)

EDITS = "/v1/images/edits"
OPEN = ("/health",)
"""What needs no key, and is answered however much is under way."""
DRAINED = 4
"""A body that is too large is read up to so many times the limit, and forgotten: clients that are still sending would
else not see why."""


class Middleware:
    """Lets requests in that hold a key and are no larger, slower or more than they may; counts and logs them.

    The log has method, path, status and time: no query, header or body, so nothing secret."""

    def __init__(self, app: FastAPI, limits: Limits, keys: Sequence[bytes]):
        self.app, self.limits, self.keys = app, limits, keys
        self.under_way = 0
        self.served: Counter[tuple[str, int]] = Counter()  # by path and status
        self.seconds: defaultdict[str, float] = defaultdict(float)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.under_way += 1
        try:
            self._check(scope)
            await self.app(scope, self._measured(scope, receive), tell)
        except Refused as error:
            await JSONResponse(error.body(), error.status_code, error.headers)(scope, receive, tell)
        finally:
            self.under_way -= 1
            elapsed = time.monotonic() - began
            path = scope["path"] if scope["path"] in self.routes else "other"
            self.served[path, status] += 1
            self.seconds[path] += elapsed
            log.info("%s %s %d %.3f s", scope["method"], path, status, elapsed)

    @property
    def routes(self) -> set[str]:
        """What is served."""
        return {getattr(route, "path", "") for route in self.app.routes}

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN and self.under_way > self.limits.requests:
            raise Refused(429, "too many requests are under way; ask again in a moment")
        if self.keys and scope["path"] not in OPEN and not self._knows(headers.get("authorization", b"")):
            raise Refused(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        if not self.keys and not is_loopback(headers.get("host", b"localhost")):
            raise Refused(403, "without API keys only this machine is served, by its own name")
        if scope["method"] == "POST":
            kind = headers.get("content-type", b"").split(b";")[0].strip().lower()
            expected = b"multipart/form-data" if scope["path"] == EDITS else b"application/json"
            if scope["path"] in self.routes and kind != expected:
                raise Refused(415, f"the content type must be {expected.decode()}")

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(key.strip(), known) for known in self.keys])

    def _measured(self, scope: Scope, receive: Receive) -> Receive:
        """The same, up to the limit of a body and the time for it."""
        limit = int(self.limits.body_megabytes * 1e6)
        declared = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
        end = time.monotonic() + self.limits.body_seconds
        length, arrived = 0, False

        async def measured() -> Message:
            nonlocal length, arrived
            if arrived:
                return await receive()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    message = await arriving(receive)
                    length += len(message.get("body", b""))
                    too_large = max(length, declared) > limit
                    while too_large and message.get("more_body") and max(length, declared) <= DRAINED * limit:
                        message = await arriving(receive)
                        length += len(message.get("body", b""))
            except TimeoutError as error:
                raise Refused(408, "the body did not arrive in time") from error
            if too_large:
                raise Refused(413, f"the body is above {self.limits.body_megabytes:g} MB; send less")
            arrived = not message.get("more_body", False)
            return message

        return measured

    def metrics(self, worker: Worker) -> str:
        """What was done so far, as Prometheus reads it."""
        lines: list[str] = []

        def family(name: str, kind: str, values: Mapping[str, float]) -> None:
            lines.append(f"# TYPE querybridge_{name} {kind}")
            lines.extend(f"querybridge_{name}{labels} {value}" for labels, value in values.items())

        served = {f'{{path="{path}",status="{status}"}}': count for (path, status), count in sorted(self.served.items())}
        family("requests_total", "counter", served)
        family("request_seconds_total", "counter", {f'{{path="{p}"}}': s for p, s in sorted(self.seconds.items())})
        family("requests_under_way", "gauge", {"": self.under_way})
        family("waiting", "gauge", {f'{{kind="{kind}"}}': count for kind, count in worker.waiting.items()})
        for name in ("pictures", "batches", "answers", "tokens", "prompt_tokens"):
            family(f"{name}_total", "counter", {"": worker.done[name]})
        return "\n".join(lines) + "\n"


async def arriving(receive: Receive) -> Message:
    """The next part of a body. Raises Refused where the client is gone."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Refused(499, "the client disconnected before its body had arrived", code="client_closed_request")
    return message
