"""HTTP in OpenAI's shapes <-> a worker. docs/server.md lists what is served and every status."""

import asyncio
import base64
import hmac
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sample.api import Chat, Painting, Refused, Repainting, read_pictures, refused
from sample.generate import settings
from sample.limits import Limits
from sample.pictures import png
from sample.pipeline import Asked
from sample.worker import Full, Question, Said, Stopped, Worker

log = logging.getLogger(__name__)
T = TypeVar("T")

EDITS = "/v1/images/edits"
OPEN = ("/health",)
"""What needs no key."""
DRAINED = 4
"""A body that is too large is read up to so many times the limit, and forgotten: clients that are still sending would
else not see why."""


def make_app(worker: Worker, name: str, limits: Limits = Limits(), keys: Sequence[str] = ()) -> ASGIApp:
    """The server of one model, called `name`; without keys, everybody may ask from this machine."""
    app = FastAPI(title="querybridge", docs_url=None, redoc_url=None)
    door = Door(app, limits, [key.encode() for key in keys])
    began = int(time.time())

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        answer = refusal(error)
        return JSONResponse(answer.body(), answer.status_code, answer.headers)

    for kind in (HTTPException, RequestValidationError, ValidationError, ValueError, Full, Stopped, TimeoutError, Exception):
        app.add_exception_handler(kind, refuse)

    def known(model: str | None) -> None:
        if model not in (None, name):
            raise Refused(404, f"model {model[:60]!r} is not here; this server has {name!r}", "model", "model_not_found")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(door.metrics(worker), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe()]}

    @app.get("/v1/models/{model:path}")  # a hub id has a slash
    async def model(model: str) -> dict[str, Any]:
        known(model)
        return describe()

    def describe() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "querybridge"}

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        known(asked.model)
        question = await asyncio.to_thread(asked.question, limits)
        answer = Answer(worker, question, limits.request_seconds)
        head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": name}
        try:
            await unless_gone(request, answer.begin())
            if asked.stream:
                usage = bool(asked.stream_options and asked.stream_options.include_usage)
                return StreamingResponse(events(answer, head, usage), media_type="text/event-stream")
            text = await unless_gone(request, answer.whole())
        except BaseException:
            answer.cancel()
            raise
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish(answer.said)}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": used(answer.said)})

    @app.post("/v1/images/generations")
    async def generations(asked: Painting, request: Request) -> Response:
        return await paint(asked, (), request)

    @app.post(EDITS)
    async def edits(request: Request) -> Response:
        async with request.form(max_fields=64) as form:
            files, fields = [], {}
            for key, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields[key] = value
                elif key in ("image", "image[]"):
                    files.append(await value.read())
                else:
                    raise Refused(422, f"{key[:60]}: this server takes no such file; leave it out", key[:60])
        if not files:
            raise Refused(422, "image: give a picture to start from", "image")
        pictures = await asyncio.to_thread(read_pictures, files, limits)
        return await paint(Repainting.model_validate(fields), tuple(pictures), request)

    async def paint(asked: Painting, images: tuple[Image.Image, ...], request: Request) -> Response:
        known(asked.model)
        if worker.pipeline is None:
            raise Refused(404, f"{name!r} is a bare MLLM, which does not draw; start the server with --release", "model")
        drawing, seeds = asked.drawing(limits, worker.pipeline.model.image_size), asked.seeds()
        if drawing.height:
            worker.pipeline.model.shape_of(drawing.height, drawing.width)
        waiting = worker.draw(Asked(asked.prompt, images), seeds, drawing)
        pictures = await unless_gone(request, all_of(waiting, limits.request_seconds))
        about = {"release": worker.pipeline.fingerprint, **settings(drawing), "software": "querybridge"}

        def data() -> list[dict[str, object]]:
            files = [png(p, {"prompt": asked.prompt, "seed": s, **about}) for p, s in zip(pictures, seeds, strict=True)]
            return [{"b64_json": base64.b64encode(f).decode(), "seed": s} for f, s in zip(files, seeds, strict=True)]

        size = f"{pictures[0].width}x{pictures[0].height}"
        return JSONResponse(
            {"created": int(time.time()), "data": await asyncio.to_thread(data), "size": size, "output_format": "png"}
        )

    return door


def refusal(error: Exception) -> Refused:
    """How an error is told."""
    match error:
        case Refused():
            return error
        case HTTPException():  # of the framework
            return Refused(error.status_code, str(error.detail))
        case RequestValidationError() | ValidationError():
            return refused(error)
        case ValueError():
            return Refused(422, " ".join(str(error).split()))
        case Full():
            return Refused(429, "too much waits already; ask again in a moment")
        case Stopped():
            return Refused(503, "the server is stopping; ask another, or later")
        case TimeoutError():
            return Refused(504, "it took too long; ask for less, or when less waits")
    return Refused(500, "the server failed; its log tells more")


class Answer:
    """An answer under way, heard from the worker's thread."""

    def __init__(self, worker: Worker, question: Question, seconds: float):
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()  # no longer than an answer may be

        def hear(piece: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._end = loop.time() + seconds
        self._said = worker.answer(question, hear)
        self._said.add_done_callback(lambda _: hear(None))

    async def begin(self) -> None:
        """Returns once the question was read; raises what was wrong with it."""
        await self._next()

    async def pieces(self) -> AsyncIterator[str]:
        """What is said, as it comes."""
        try:
            while (piece := await self._next()) is not None:
                yield piece
        finally:
            self.cancel()

    async def whole(self) -> str:
        """All that is said."""
        return "".join([piece async for piece in self.pieces()])

    @property
    def said(self) -> Said:
        """How it ended; once it has."""
        return self._said.result()

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._said.cancel()

    async def _next(self) -> str | None:
        async with asyncio.timeout_at(self._end):
            piece = await self._pieces.get()
        if piece is None:
            self._said.result()
        return piece


async def events(answer: Answer, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """An answer as server-sent events; what goes wrong on the way is the last one."""
    none = {"usage": None} if with_usage else {}

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**head, "object": "chat.completion.chunk", "choices": [choice], **none})

    yield event({"role": "assistant", "content": ""})
    try:
        async for piece in answer.pieces():
            if piece:
                yield event({"content": piece})
        yield event({}, finish(answer.said))
    except Exception as error:
        yield sse(refusal(error).body())
        return
    finally:
        answer.cancel()
    if with_usage:
        yield sse({**head, "object": "chat.completion.chunk", "choices": [], "usage": used(answer.said)})
    yield "data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def finish(said: Said) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "stop" if said.whole else "length"


def used(said: Said) -> dict[str, int]:
    """Tokens, in OpenAI's words."""
    total = said.prompt_tokens + said.tokens
    return {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.tokens, "total_tokens": total}


async def all_of(futures: "Sequence[Future[Image.Image]]", seconds: float) -> list[Image.Image]:
    """The pictures; all are given up when one fails, or they take longer."""
    try:
        async with asyncio.timeout(seconds):
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    finally:
        for future in futures:
            future.cancel()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` comes to; ends it when the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client went", code="client_closed_request")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


class Door:
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
        if self.under_way > self.limits.requests:
            raise Refused(429, "too many requests are under way; ask again in a moment")
        if self.keys and scope["path"] not in OPEN and not self._knows(headers.get("authorization", b"")):
            raise Refused(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        if not self.keys and not _loopback(headers.get("host", b"localhost")):
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
        raise Refused(499, "the client went before its body had arrived", code="client_closed_request")
    return message


def _loopback(host: bytes) -> bool:
    try:
        return urlsplit(f"//{host.decode('latin-1')}").hostname in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        return False
