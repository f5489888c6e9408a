"""The server over real sockets, asked by OpenAI's own client and, where that is too polite, by hand."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from model.prefix import Turn
from sample import serve
from sample.api import Chat, Message
from sample.cli import run
from sample.limits import Capacity, Limits
from sample.pictures import png
from sample.pipeline import Asked, Pipeline
from sample.routes import make_app
from sample.server import Server, uvicorn_config
from sample.settings import Drawing, Guidance
from sample.worker import Worker
from tests import releases, tiny
from train.benchmark_serving import server_process

KEY = "a-key-for-tests-0123456789"
LIMITS = Limits(body_megabytes=0.2, body_seconds=60.0, images=2, megapixels=0.01, characters=500, request_seconds=120.0)
get, post = partial(httpx.get, timeout=60), partial(httpx.post, timeout=60)
FEW = {"steps": 2}
LONG = 20_000  # steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    releases.release(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.from_release(folder / "release")


@contextmanager
def served(pipeline, limits=LIMITS, keys=(), grace_seconds=1.0, mllm=None, name="tiny", **capacity):
    """The address of a server in a thread of this process, and its worker."""
    worker = Worker(pipeline, mllm or pipeline.model.mllm, Capacity(**capacity))
    app = make_app(worker, name, limits, keys)
    server, listening = Server(worker, uvicorn_config(app, grace_seconds), grace_seconds), serve.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", worker, server
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()


@pytest.fixture(scope="module")
def here(pipeline):
    with served(pipeline, batch=8) as (url, worker, _):
        yield url, worker


@pytest.fixture(scope="module")
def url(here):
    return here[0]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def data_url(picture=None, kind="png"):
    file = png(picture or tiny.image((16, 16)), {})
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def user(text, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def said(pipeline, *turns, tokens):
    mllm = pipeline.model.mllm
    return "".join(mllm.reply(mllm.builder([turns]), tokens))


def opened(item):
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def near(picture, other):
    return np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1


def test_an_answer_is_the_models_streamed_and_whole(pipeline, client):
    asked = {"model": "tiny", "messages": user("how many circle ?", data_url()), "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    expected = said(pipeline, Turn("user", "how many circle ?", (tiny.image((16, 16)),)), tokens=8)
    assert whole.choices[0].message.content == expected
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == ("length" if whole.usage.completion_tokens == 8 else "stop")
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_a_conversation_and_a_stop(pipeline, client):
    turns = [Turn("system", "be kind"), Turn("user", "is there a star ?"), Turn("assistant", "no"), Turn("user", "why ?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = said(pipeline, *turns, tokens=8)
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 8}
    assert client.chat.completions.create(**asked, user="me", top_p=1, n=1).choices[0].message.content == expected
    stop = expected[3:5]
    cut = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (expected[: expected.index(stop)], "stop")


def test_a_picture_is_that_of_the_pipeline(pipeline, client):
    given = {"steps": 2, "guidance": 2.0, "negative": "blue", "solver": "euler", "seed": 5}
    answer = client.images.generate(model="tiny", prompt="a red circle", n=2, size="16x16", extra_body=given)
    drawing = Drawing(2, Guidance(2.0), "blue", "euler", 16, 16)
    for number, item in enumerate(answer.data):
        picture = opened(item)
        assert near(picture, pipeline(["a red circle"], [5 + number], drawing)[0])
        assert (picture.info["prompt"], picture.info["seed"]) == ("a red circle", str(5 + number))
        assert item.seed == 5 + number
    assert answer.size == "16x16"
    unseeded = [client.images.generate(prompt="a red circle", extra_body=FEW).data[0].seed for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("several", [False, True])
def test_an_edit_starts_from_its_pictures(pipeline, client, several):
    source = tiny.image((16, 16))
    files = [("x.png", png(source, {}))] * (1 + several)
    answer = client.images.edit(
        image=files if several else files[0], prompt="make it green", extra_body={"seed": 1, "image_guidance": 1.5, **FEW}
    )
    asked = Asked("make it green", (source,) * len(files))
    assert near(opened(answer.data[0]), pipeline([asked], [1], Drawing(2, Guidance(image=1.5)))[0])


def test_eight_at_once_are_as_one_alone(pipeline, here, client):
    _, worker = here
    before = worker.done["batches"]
    with ThreadPoolExecutor(8) as pool:
        drawn = pool.map(
            lambda seed: client.images.generate(prompt="a red circle", extra_body={"seed": seed, "steps": 4}), range(8)
        )
        pictures = [opened(answer.data[0]) for answer in drawn]
    assert worker.done["batches"] - before < 8
    for seed, picture in enumerate(pictures):
        assert near(picture, pipeline(["a red circle"], [seed], Drawing(4))[0])


def test_models_health_and_metrics(url, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "querybridge"
    assert get(f"{url}/health").json() == {"status": "ok"}
    get(f"{url}/{'x' * 50}")
    text = get(f"{url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['querybridge_requests_total{path="/v1/models",status="200"}']) >= 1
    assert float(lines['querybridge_requests_total{path="other",status="404"}']) >= 1  # no label from outside
    assert {"querybridge_pictures_total", "querybridge_tokens_total", 'querybridge_waiting{kind="pictures"}'} <= set(lines)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
DEEP = b"[" * 100_000
REFUSED = {
    "no json": (400, "/v1/chat/completions", b"{"),
    "deep json": (400, "/v1/chat/completions", DEEP),
    "other model": (404, "/v1/chat/completions", {**CHAT, "model": "gpt"}),
    "no path": (404, "/v1/nothing", {}),
    "method": (405, "/v1/models", {}),
    "unknown field": (422, "/v1/chat/completions", {**CHAT, "temprature": 1}),
    "a list": (422, "/v1/chat/completions", []),
    "tools": (422, "/v1/chat/completions", {**CHAT, "tools": [{}]}),
    "two answers": (422, "/v1/chat/completions", {**CHAT, "n": 2}),
    "nan": (
        422,
        "/v1/chat/completions",
        b'{"model": "tiny", "messages": [{"role": "user", "content": ""}], "temperature": NaN}',
    ),
    "no messages": (422, "/v1/chat/completions", {**CHAT, "messages": []}),
    "assistant last": (422, "/v1/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": "x"}]}),
    "long answer": (422, "/v1/chat/completions", {**CHAT, "max_tokens": 5000}),
    "above context": (422, "/v1/chat/completions", {**CHAT, "max_tokens": 1024}),
    "long text": (422, "/v1/chat/completions", {**CHAT, "messages": user("a" * 501)}),
    "metadata service": (422, "/v1/chat/completions", {**CHAT, "messages": user("", "http://169.254.169.254/latest")}),
    "own file": (422, "/v1/chat/completions", {**CHAT, "messages": user("", "file:///etc/passwd")}),
    "remote": (422, "/v1/chat/completions", {**CHAT, "messages": user("", "https://example.org/x.png")}),
    "no base64": (422, "/v1/chat/completions", {**CHAT, "messages": user("", "data:image/png;base64,!!!!")}),
    "svg": (415, "/v1/chat/completions", {**CHAT, "messages": user("", "data:image/svg+xml;base64,AAAA")}),
    "no picture": (415, "/v1/chat/completions", {**CHAT, "messages": user("", "data:image/png;base64,AAAA")}),
    "pixels": (413, "/v1/chat/completions", {**CHAT, "messages": user("", data_url(Image.new("RGB", (101, 100))))}),
    "pictures": (413, "/v1/chat/completions", {**CHAT, "messages": user("", *[data_url()] * 3)}),
    "body": (413, "/v1/chat/completions", b" " * 300_000),
    "huge body": (413, "/v1/chat/completions", b" " * 3_000_000),
    "size": (422, "/v1/images/generations", {"prompt": "x", "size": "big"}),
    "odd size": (422, "/v1/images/generations", {"prompt": "x", "size": "15x16"}),
    "large size": (422, "/v1/images/generations", {"prompt": "x", "size": "64x64"}),
    "many": (422, "/v1/images/generations", {"prompt": "x", "n": 9}),
    "steps": (422, "/v1/images/generations", {"prompt": "x", "steps": 101}),
    "no step": (422, "/v1/images/generations", {"prompt": "x", "steps": 0}),
    "guidance": (422, "/v1/images/generations", {"prompt": "x", "guidance": "strong"}),
    "seed": (422, "/v1/images/generations", {"prompt": "x", "seed": -1}),
    "last seed": (422, "/v1/images/generations", {"prompt": "x", "seed": 2**63 - 1, "n": 2}),
    "url": (422, "/v1/images/generations", {"prompt": "x", "response_format": "url"}),
    "long prompt": (422, "/v1/images/generations", {"prompt": "red " * 120}),
    "half a character": (422, "/v1/images/generations", b'{"prompt": "\\ud800"}'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_how(url, name):
    status, path, body = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = post(url + path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def test_bodies_of_another_type_are_refused(url):
    assert post(f"{url}/v1/chat/completions", content=json.dumps(CHAT)).status_code == 415
    assert post(f"{url}/v1/chat/completions", data={"model": "tiny"}).status_code == 415
    assert post(f"{url}/v1/images/edits", json={"prompt": "x"}).status_code == 415
    form = {"Content-Type": "multipart/form-data"}
    assert post(f"{url}/v1/images/edits", content=b"x", headers=form).status_code == 400
    picture = ("x.png", png(tiny.image((16, 16)), {}))
    for files, data, status in (
        ({"image": picture}, {"prompt": "x", "steps": "many"}, 422),
        ({"mask": picture}, {"prompt": "x"}, 422),
        ({"x": b""}, {"prompt": "x"}, 422),
        ({"image": ("x.png", b"none")}, {"prompt": "x"}, 415),
        ([("image[]", picture)] * 3, {"prompt": "x"}, 413),
        ([("image[]", picture)] * 9, {"prompt": "x"}, 413),
    ):
        assert post(f"{url}/v1/images/edits", files=files, data=data).status_code == status


def test_a_body_that_stalls_is_given_up(pipeline):
    with served(pipeline, replace(LIMITS, body_seconds=1.0)) as (url, _, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as stalled:
            head = "Host: localhost", "Content-Type: application/json", "Content-Length: 9", "", "{"
            stalled.sendall("\r\n".join(["POST /v1/chat/completions HTTP/1.1", *head]).encode())
            stalled.settimeout(60)
            assert stalled.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/chat/completions", "application/json"), ("/v1/images/edits", "multipart/form-data; boundary=x")],
)
def test_a_client_that_goes_in_the_middle_of_its_body_is_no_failure_of_ours(url, path, kind):
    host, port = url.removeprefix("http://").split(":")
    counted = f'querybridge_requests_total{{path="{path}",status="499"}}'

    def gone():
        lines = get(f"{url}/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(counted)), 0.0)

    before = gone()
    with socket.create_connection((host, int(port))) as leaving:
        head = "Host: localhost", f"Content-Type: {kind}", "Content-Length: 99", "", "--x"
        leaving.sendall("\r\n".join([f"POST {path} HTTP/1.1", *head]).encode())
        until(lambda: "requests_under_way 2" in get(f"{url}/metrics").text)
    until(lambda: gone() == before + 1)


def test_other_names_for_this_machine_are_refused_without_keys(url):
    """A web page could else have its own name point here."""
    assert get(f"{url}/v1/models", headers={"Host": "attacker.example"}).status_code == 403


def test_keys(pipeline):
    with served(pipeline, keys=(KEY, KEY + "2")) as (url, _, _):
        for authorization in ({}, {"Authorization": KEY}, {"Authorization": "Bearer " + KEY[:-1]}):
            answer = get(f"{url}/v1/models", headers=authorization)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert get(f"{url}/metrics", headers=authorization).status_code == 401
        for key in (KEY, KEY + "2"):
            assert openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data
        assert get(f"{url}/health").status_code == 200


def test_too_much_at_once_and_too_long_are_told(pipeline):
    limits = Limits(request_seconds=10.0, steps=LONG)
    with served(pipeline, limits, waiting=1) as (url, worker, _), ThreadPoolExecutor(4) as pool:
        asked = {"prompt": "a red circle", "steps": LONG}
        answers = list(pool.map(lambda _: post(f"{url}/v1/images/generations", json=asked, timeout=60), range(4)))
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {429, 504}
        assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 429)
        assert all(answer.headers["x-should-retry"] == "false" for answer in answers if answer.status_code == 504)
        until(lambda: not sum(worker.waiting.values()))  # nothing is left over
        assert post(f"{url}/v1/images/generations", json={**asked, "steps": 1}).status_code == 200


def test_health_is_answered_however_much_is_under_way(pipeline):
    with served(pipeline, Limits(requests=1, steps=LONG)) as (url, worker, _), ThreadPoolExecutor(1) as pool:
        asked = {"prompt": "a red circle", "steps": LONG}
        drawing = pool.submit(post, f"{url}/v1/images/generations", json=asked, timeout=60)
        until(lambda: get(f"{url}/v1/models").status_code == 429)
        assert get(f"{url}/health").status_code == 200
        worker.stop()
        assert drawing.result().status_code == 503
        assert get(f"{url}/health").status_code == 503


def test_a_seed_is_drawn_by_lot_where_none_is_given():
    asked = Chat(model="tiny", messages=[Message(role="user", content="hello")], temperature=1.0)
    assert len({asked.question(LIMITS).seed for _ in range(5)}) > 1
    assert asked.model_copy(update={"seed": 7}).question(LIMITS).seed == 7


def test_a_client_that_goes_ends_its_work(pipeline):
    limits = Limits(steps=LONG)
    with served(pipeline, limits) as (url, worker, _):
        with pytest.raises(httpx.ReadTimeout):
            post(f"{url}/v1/images/generations", json={"prompt": "x", "steps": LONG}, timeout=0.5)
        assert post(f"{url}/v1/images/generations", json={"prompt": "x", "steps": 1}).status_code == 200
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
            next(stream.iter_lines())
        until(lambda: not worker._answers)


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_turns_that_the_chat_template_refuses_are_the_clients_error(pipeline, client, monkeypatch):
    builder = pipeline.model.mllm.builder
    strict = "{% if messages[1:] and messages[1].role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    monkeypatch.setattr(builder, "template", strict + builder.tokenizer.chat_template)
    client.chat.completions.create(**CHAT, max_tokens=1)
    with pytest.raises(openai.UnprocessableEntityError, match="messages: roles must alternate"):
        client.chat.completions.create(model="tiny", messages=[*user("a"), *user("b")])


def test_a_bare_mllm_answers_and_draws_nothing(pipeline):
    with served(None, mllm=pipeline.model.mllm, name="maker/tiny") as (url, _, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        said = client.chat.completions.create(**{**CHAT, "model": "maker/tiny"}, max_tokens=4)
        assert said.choices[0].message.content is not None
        assert get(f"{url}/v1/models/maker/tiny").json()["id"] == "maker/tiny"
        with pytest.raises(openai.NotFoundError, match="release"):
            client.images.generate(prompt="a red circle")


def test_stopping_refuses_what_takes_longer_than_the_grace(pipeline):
    with served(pipeline, Limits(steps=LONG), grace_seconds=0.3) as (url, _, server), ThreadPoolExecutor(2) as pool:
        asked = {"prompt": "x", "steps": LONG}
        long = pool.submit(post, f"{url}/v1/images/generations", json=asked, timeout=60)
        until(lambda: "requests_under_way 2" in get(f"{url}/metrics").text)
        server.should_exit = True
        assert long.result().status_code == 503
        with pytest.raises(httpx.ConnectError):
            get(f"{url}/health")


def test_the_command_finishes_what_it_began_and_tells_no_secrets(folder):
    """SIGTERM in the middle of a drawing: it is finished, and the exit code is 0; nothing of requests is in the log."""
    (folder / "keys").write_text(f"{KEY}\n")
    secrets = {"HF_TOKEN": "hf_canary", "OPENAI_API_KEY": "sk-canary"}
    options = ["--release", str(folder / "release"), "--api-key-file", str(folder / "keys")]
    with (
        server_process(options, folder / "log", env={**os.environ, **secrets}) as (process, url),
        httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        asked, paint = {"prompt": "a secret wish", "steps": 100}, f"{url}/images/generations"
        assert client.post(f"{paint}?key=canary", json={**asked, "steps": 1}).is_success
        assert client.post(paint, json=asked, headers={"Authorization": "Bearer canary"}).status_code == 401
        drawn = pool.submit(client.post, paint, json=asked)
        metrics = url.removesuffix("/v1") + "/metrics"
        until(lambda: "requests_under_way 2" in client.get(metrics).text or drawn.done())
        process.send_signal(signal.SIGTERM)
        assert drawn.result().status_code == 200
        client.close()
        assert process.wait(60) == 0
    log = (folder / "log").read_text()
    assert "/v1/images/generations 200" in log
    assert not [word for word in (KEY, "canary", "secret wish") if word in log]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "either --release or --model"),
        (["--release", "no/where"], "no/where"),
        (["--release", "x", "--host", "0.0.0.0"], "--api-key-file"),
        (["--release", "x", "--api-key-file", "short"], "16 or more"),
        (["--release", "x", "--api-key-file", "empty"], "is empty"),
        (["--release", "x", "--port", "99999"], "--port"),
        (["--release", "x", "--grace-seconds", "-1"], "--grace-seconds"),
    ],
)
def test_what_the_command_line_gets_wrong(options, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "empty").write_text("\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run(serve.main, options) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "secret" not in err


def test_help_imports_nothing_heavy():
    code = "import sys, sample.serve; sys.exit(bool({'torch', 'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
