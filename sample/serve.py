"""A release -> a server that draws and answers over HTTP, the way OpenAI's clients ask.

    python -m sample.serve --release assets/world/release
    curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'

What is served, its limits and every status are in docs/server.md. SIGTERM: nothing new is taken, what is under way is
finished or, after --grace-seconds, refused with 503; then the exit code is 0.
"""

import logging
import signal
import socket
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from sample.cli import run
from sample.limits import Capacity, Limits

MIN_KEY = 16  # characters


@dataclass(frozen=True, kw_only=True)
class Args:
    """Serve a model over HTTP."""

    release: Path | None = None
    """A release folder: its MLLM answers, its bridge draws."""
    model: str | None = None
    """Instead of a release: the folder or hub id of a bare MLLM, which only answers."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of a bare MLLM; a release brings its own."""
    name: str | None = None
    """What clients call the model; by default querybridge, or the bare MLLM's id."""
    host: str = "127.0.0.1"
    """Where to listen; others than this machine can reach it only with API keys."""
    port: int = 8000
    """0: any that is free; it is printed."""
    api_key_file: Path | None = None
    """A text file with an API key on each line, of 16 characters or more."""
    grace_seconds: float = 30.0
    """How long what is under way may go on after SIGTERM."""
    limits: Annotated[Limits, OmitArgPrefixes] = Limits()
    capacity: Annotated[Capacity, OmitArgPrefixes] = Capacity()


def main(argv: list[str] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    args = tyro.cli(Args, args=argv)
    if (args.release is None) == (args.model is None):
        raise ValueError("give either --release or --model, whose MLLM is to answer")
    if not 0 <= args.grace_seconds < float("inf"):
        raise ValueError(f"--grace-seconds {args.grace_seconds} is no time; give 0 or more")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port {args.port} is not a port; give 0 to 65535")
    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    if not keys and not binds_loopback(args.host):
        raise ValueError(f"--host {args.host} can be reached from elsewhere; give --api-key-file, or 127.0.0.1")
    listening = listen(args.host, args.port)
    # heavy imports wait until the arguments are right, so that --help stays instant
    try:
        from sample.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install -e '.[serve]'") from error

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while loading; and uvicorn passes it on once it is done
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    serve(args, listening, keys)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, a line each.

    Raises:
        ValueError: there is none, or one is short or not ASCII.
    """
    keys = tuple(line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip())
    if not keys:
        raise ValueError(f"API key file {path} is empty; write a key on each line")
    if short := [number for number, key in enumerate(keys, 1) if len(key) < MIN_KEY or not key.isascii() or " " in key]:
        raise ValueError(f"API key file {path}: key {short[0]} is no {MIN_KEY} or more ASCII characters without blanks")
    return keys


def binds_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; connections whose peer reads nothing for a minute end.

    Raises:
        ValueError: the place cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)  # connections inherit it
        listening.bind(address)
        listening.listen(256)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error}; choose another") from error
    return listening


if __name__ == "__main__":
    sys.exit(run(main))
