"""HTTP in OpenAI's shapes <-> a worker. docs/server.md lists what is served and every status."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from sample.api import Chat, Painting, Refused, Repainting, read_pictures, refused
from sample.drawn import about
from sample.limits import Limits
from sample.middleware import EDITS, Middleware
from sample.pictures import png
from sample.pipeline import Asked
from sample.worker import Full, Question, Said, Stopped, Worker

T = TypeVar("T")


def make_app(worker: Worker, name: str, limits: Limits = Limits(), keys: Sequence[str] = ()) -> ASGIApp:
    """The server of one model, called `name`; without keys, everybody may ask from this machine."""
    app = FastAPI(title="querybridge", docs_url=None, redoc_url=None)
    middleware = Middleware(app, limits, [key.encode() for key in keys])
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
        if not worker.well:
            raise Refused(503, "the last requests failed inside the server; see its log and start it anew")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(middleware.metrics(worker), media_type="text/plain; version=0.0.4")

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
        release = worker.pipeline.fingerprint

        def data() -> list[dict[str, object]]:
            files = [png(p, about(asked.prompt, s, drawing, release)) for p, s in zip(pictures, seeds, strict=True)]
            return [{"b64_json": base64.b64encode(f).decode(), "seed": s} for f, s in zip(files, seeds, strict=True)]

        size = f"{pictures[0].width}x{pictures[0].height}"
        return JSONResponse(
            {"created": int(time.time()), "data": await asyncio.to_thread(data), "size": size, "output_format": "png"}
        )

    return middleware


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
            raise Refused(499, "the client disconnected", code="client_closed_request")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
