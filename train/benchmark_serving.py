"""What clients that ask at once gain over one that asks alone: `python -m train.benchmark serving`.

A server in a process of its own, asked over HTTP. Pictures that wait together are drawn as batches; answers take turns,
token by token. One client and many take turns too, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from sample.measures import Measure, show, spread
from train.machine import record

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
REQUEST_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Time pictures and answers of a server, asked by one client and by many at once."""

    release: Path = Path("assets/world/release")
    clients: int = 16
    batch: int = 16
    """Pictures drawn as one, at most."""
    prompt: str = "a red circle left of a blue square"
    steps: int = 30
    """Of each picture."""
    question: str = "describe a picture with a red circle"
    answer_tokens: int = 64
    """The longest answer; a temperature of 1 makes most of them long."""
    repeats: int = 6
    """Rounds, in each of which every client asks once."""
    json: Path | None = None
    """Where to write the measures."""


def serving(args: Serving) -> None:
    """Measures, prints and writes. Raises ValueError for a size below 1, or a server that does not start."""
    if min(args.clients, args.batch, args.steps, args.answer_tokens, args.repeats) < 1:
        raise ValueError("give sizes and repeats of at least 1")
    options = ["--release", str(args.release), "--batch", str(args.batch), "--answers", str(args.clients)]
    rates: dict[str, list[float]] = {"alone.pictures": [], "pictures": [], "alone.tokens": [], "tokens": []}
    seconds: dict[str, list[float]] = {"alone.picture": [], "picture": []}
    with tempfile.TemporaryDirectory() as folder, server_process(options, Path(folder) / "log") as (_, url):
        picture, answer = partial(_picture, url, args), partial(_answer, url, args)
        for warming in (picture, answer):
            warming(0)
        for _ in range(args.repeats):
            for name, clients in (("alone.", 1), ("", args.clients)):
                number = max(1, args.clients // 4) if clients == 1 else args.clients
                drawn, took = _round(picture, clients, number)
                rates[f"{name}pictures"].append(len(drawn) / took)
                seconds[f"{name}picture"].extend(drawn)
                tokens, took = _round(answer, clients, number)
                rates[f"{name}tokens"].append(sum(tokens) / took)
    gains = {
        kind: [many / one for many, one in zip(rates[kind], rates[f"alone.{kind}"], strict=True)]
        for kind in ("pictures", "tokens")
    }
    measures = {f"serving.{name}": spread(values, "1/s") for name, values in rates.items()}
    measures |= {f"serving.{name}.seconds": spread(values, "s") for name, values in seconds.items()}
    measures |= {f"serving.{kind}.gain": spread(values, "x") for kind, values in gains.items()}
    measures["serving.clients"] = Measure(args.clients)
    show(f"{args.clients} clients at once, and one; batches up to {args.batch}, {args.steps} steps", measures)
    if args.json is not None:
        record(args.json, measures)


@contextmanager
def server_process(
    options: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m sample.serve` with these options on a free port: the process and its address. Killed in the end.

    Raises:
        ValueError: it does not start.
    """
    command = [sys.executable, "-m", "sample.serve", "--port", "0", *options]
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # "NAME at URL", or nothing when it ended
        if " at " not in line:
            raise ValueError(f"the server did not start: {log.read_text()[-500:]}")
        url = line.split(" at ")[1].strip()
        _wait_for(url.removesuffix("/v1") + "/health")
        yield process, url
    finally:
        process.kill()
        process.communicate()


def _wait_for(url: str) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            urlopen(url, timeout=START_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(f"the server does not answer: {error}") from error
            time.sleep(0.02)


def _round(ask: Any, clients: int, number: int) -> tuple[list[float], float]:
    """What so many requests came to, and how long all of them took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        came = list(pool.map(ask, range(number)))
    return came, time.perf_counter() - began


def _picture(url: str, args: Serving, seed: int) -> float:
    """Seconds that one took."""
    began = time.perf_counter()
    _post(f"{url}/images/generations", {"prompt": args.prompt, "seed": seed, "steps": args.steps})
    return time.perf_counter() - began


def _answer(url: str, args: Serving, seed: int) -> float:
    """Tokens of one."""
    asked = {
        "model": "querybridge",
        "messages": [{"role": "user", "content": args.question}],
        "max_tokens": args.answer_tokens,
        "temperature": 1.0,
        "seed": seed,
    }
    return _post(f"{url}/chat/completions", asked)["usage"]["completion_tokens"]


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=REQUEST_SECONDS) as answer:
        return json.load(answer)
