"""What serve.py was asked for -> a model, its worker and uvicorn, until a signal."""

import asyncio
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from model import mllm
from sample.pipeline import Pipeline, default_device
from sample.routes import make_app
from sample.worker import Worker

if TYPE_CHECKING:
    from sample.serve import Args

FAREWELL_SECONDS = 5  # for the last answers to be sent


def serve(args: "Args", listening: socket.socket, keys: Sequence[str]) -> None:
    """Loads, says where it listens, and serves. ValueError for a release or model that cannot be loaded."""
    if args.release is not None:
        pipeline = Pipeline.from_release(args.release)
        name, frozen = args.name or "querybridge", pipeline.model.mllm
        assert pipeline.fingerprint  # computed here, once
    else:
        assert args.model is not None
        config = mllm.MLLMConfig(args.model, dtype=args.dtype)
        pipeline, name, frozen = None, args.name or args.model, mllm.load(config).to(default_device())
    worker = Worker(pipeline, frozen, args.capacity)
    server = Server(
        worker, uvicorn_config(make_app(worker, name, args.limits, keys), args.grace_seconds), args.grace_seconds
    )
    host, port = listening.getsockname()[:2]
    print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    try:
        server.run(sockets=[listening])
    finally:
        worker.stop()


def uvicorn_config(app: ASGIApp, grace_seconds: float) -> uvicorn.Config:
    """Uvicorn's part, which logs no requests: our own log has less in it."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=int(grace_seconds + FAREWELL_SECONDS),
    )


class Server(uvicorn.Server):
    """Uvicorn, which ends what the worker still does some time after a signal; its clients then hear so."""

    def __init__(self, worker: Worker, config: uvicorn.Config, grace_seconds: float):
        super().__init__(config)
        self.worker, self.grace_seconds = worker, grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new connections; waits for those there are."""
        loop = asyncio.get_running_loop()
        loop.call_later(self.grace_seconds, loop.run_in_executor, None, self.worker.stop)
        await super().shutdown(sockets)
