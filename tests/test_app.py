"""The page: what it lets in and out, without a browser; and what people do with it, in one."""

import io
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from playwright.sync_api import expect

from data.world.captions import Group
from data.world.reader import read
from data.world.render import render
from data.world.scene import Object, Scene
from sample import app, page
from sample.cli import run
from tests import browser, releases

WORLD = Path("assets/world/release")
RED_CIRCLE = Scene("white", (Object("circle", "red", "large", 0.5, 0.5),))
in_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def served(release):
    """A page of a tiny release, served by this process."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
            patched.setenv(name, "")  # put back afterwards
        patched.setenv("GRADIO_SHARE", "True")
        patched.setenv("GRADIO_ALLOWED_PATHS", "/")
        with app.serving(app.Args(release=release, port=browser.free_port(), seconds=60)) as blocks:
            yield blocks


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.local_url, timeout=60) as client:
        yield client


def asked(client, blocks, name: str, *values) -> tuple[bool, str]:
    """Whether the page's endpoint of this name took raw values, as any program could send them; and what it said."""
    endpoint = next(number for number, each in blocks.fns.items() if each.name == name)
    job = {"fn_index": endpoint, "data": values, "session_hash": name}
    client.post("gradio_api/queue/join", json=job).raise_for_status()
    said = []
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": name}) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if event.get("msg") == "log":
                said.append(event["log"])
            if event.get("msg") == "process_completed":
                said.append(str(event["output"].get("error")))
                return event["success"] and len(said) == 1, " ".join(said)
    raise AssertionError("the job never ended")


def test_the_page_is_for_this_machine_alone(served, client):
    assert (served.server_name, served.share, served.share_url) == ("127.0.0.1", False, None)
    assert served.allowed_paths == []  # whatever the environment says
    assert not served.analytics_enabled
    assert not served.run_history
    assert served.max_file_size == 20 * 2**20
    assert served.config["api_prefix"]
    assert served._queue.max_size == page.WAITING
    assert not served.api_open
    jobs = [each for each in served.fns.values() if each.concurrency_id == "model"]
    assert sorted({each.name for each in jobs}) == ["draw", "edit", "send"]
    assert {each.concurrency_limit for each in jobs} == {1}
    assert {each.api_visibility for each in served.fns.values()} == {"private"}
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert client.get("/", headers={"host": "rebound.example:7860"}).status_code == 403


def test_files_of_this_machine_stay_here(served, client, release, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in (tmp_path / "secret.png", release / "model.json", Path("README.md").absolute(), Path("/etc/passwd")):
        assert client.get(f"gradio_api/file={path}").status_code in (403, 404)
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        taken, said = asked(client, served, "edit", file, None, "a star", 0, False, 2, 1, 3)
        assert not taken
        assert "secret" not in said
    large = {"files": ("large.png", io.BytesIO(bytes(20 * 2**20 + 1)))}
    assert client.post("gradio_api/upload", files=large).status_code == 413


def test_what_the_fields_would_not_let_through_is_refused_behind_them_too(served, client):
    good = ["a star", "", 1, 0, False, 2, 1, "dpm++"]
    assert asked(client, served, "draw", *good) == (True, "None")
    bad = {0: "a" * 3000, 2: 1000, 3: -1, 5: 10**6, 6: 10**6, 7: "magic"}
    for position, value in bad.items():
        taken, said = asked(client, served, "draw", *good[:position], value, *good[position + 1 :])
        assert not taken, (position, said)
    assert "3,000 characters are too many" in asked(client, served, "draw", bad[0], *good[1:])[1]


def test_its_files_are_gone_with_it(release, monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    with app.serving(app.Args(release=release, port=browser.free_port())) as blocks:
        files = Path(os.environ["GRADIO_TEMP_DIR"])
        with httpx.Client(base_url=blocks.local_url) as client:
            uploaded = client.post("gradio_api/upload", files={"files": ("x.png", b"x")}).json()
        assert Path(uploaded[0]).is_relative_to(files)
        assert Path(uploaded[0]).exists()
    assert not files.exists()


def test_mistakes_on_the_command_line_exit_with_two(release, tmp_path, served, monkeypatch, capsys):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command's own handler would stay for all tests to come
    cases = {
        "--port 0 is not a port": ["--release", release, "--port", "0"],
        "seconds: 0.0 leaves no time": ["--release", release, "--seconds", "0"],
        "is no release": ["--release", tmp_path],
        f"--port {served.server_port} cannot be had": ["--release", release, "--port", served.server_port],
    }
    for words, arguments in cases.items():
        assert run(app.main, list(map(str, arguments))) == 2
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def visit():
    """The page of the world's release by the real command, in Chromium."""
    with browser.served(WORLD, "--seconds", "120") as url, browser.browsing(url) as seen:
        yield seen


def gallery(seen, number: int) -> list[PngImageFile]:
    """So many pictures, once they are there."""
    images = seen.locator(".pictures button img")
    expect(images).to_have_count(number)
    addresses = [image.get_attribute("src") or "" for image in images.all()]
    return [PngImageFile(io.BytesIO(seen.request.get(address).body())) for address in addresses]


def draw(seen, prompt: str, count: int = 1, seed: int = 0) -> None:
    seen.get_by_role("tab", name="Draw").click()
    slide(seen, "Pictures", count)  # first: then the page is heard
    fields = seen.get_by_label("Prompt"), seen.get_by_role("spinbutton", name="Seed").first
    for field, value in zip(fields, (prompt, str(seed)), strict=True):
        field.fill(value)
        expect(field).to_have_value(value)
    seen.click("#draw")


def slide(seen, name: str, number: int) -> None:
    """Types a number until its slider has moved: a field that has just appeared is not heard yet."""
    slider = seen.get_by_role("slider", name=name).first
    for patience in (1000, 2000, 4000, 8000, 16_000):
        seen.get_by_role("spinbutton", name=name).first.fill(str(number))
        with suppress(AssertionError):
            return expect(slider).to_have_value(str(number), timeout=patience)
    raise AssertionError(f"{name} stays at {slider.input_value()}")


def upload(seen, selector: str, name: str, data: bytes) -> None:
    seen.set_input_files(f"{selector} input[type=file]", {"name": name, "mimeType": "image/png", "buffer": data})


def png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "PNG")
    return file.getvalue()


@in_browser
def test_a_prompt_becomes_a_picture_and_nothing_leaves_the_machine(visit):
    addresses = []
    visit.on("request", lambda request: addresses.append(request.url))
    visit.reload()
    draw(visit, "a red circle", seed=3)
    expect(visit.locator("#draw-note")).to_contain_text("1 picture in")
    [picture] = gallery(visit, 1)
    scene = read(np.asarray(picture)).scene()
    assert [Group(1, "red", "circle").matches(thing) for thing in scene.objects] == [True]
    assert (picture.text["prompt"], picture.text["seed"]) == ("a red circle", "3")
    expect(visit.get_by_text("seed 3")).to_have_count(1)
    assert all(address.startswith((visit.url, "data:", "blob:")) for address in addresses)


@in_browser
def test_a_drawing_that_is_cancelled_makes_way_for_the_next(visit):
    note = visit.locator("#draw-note")
    visit.get_by_text("More settings").first.click()
    slide(visit, "Steps", 100)
    draw(visit, "a blue star", count=8)
    expect(note).to_contain_text(re.compile(r"Step \d+ of 100"))
    visit.click("#draw-cancel")
    expect(note).to_have_text("Cancelled")
    slide(visit, "Steps", 10)
    draw(visit, "a red circle")
    expect(note).to_contain_text("1 picture in")  # 8 pictures of 100 steps would take far longer
    gallery(visit, 1)


@in_browser
def test_an_upload_that_is_no_picture_is_refused_at_once(visit):
    visit.get_by_role("tab", name="Edit").click()
    upload(visit, "#before", "text.png", b"this is a text")
    visit.get_by_text("image text.png: an image cannot be decoded; give a whole PNG, JPEG or WebP file").wait_for()
    visit.wait_for_selector("#before input[type=file]", state="attached")  # it is empty again
    upload(visit, "#before", "circle.png", png(RED_CIRCLE))
    visit.wait_for_selector("#before img")
    visit.get_by_label("Instruction").fill("make it blue")
    visit.click("#edit")
    expect(visit.locator("#edit-note")).to_contain_text("1 picture in")
    visit.get_by_role("button", name="Use as source").click()
    after = visit.locator("#after img").get_attribute("src")
    visit.wait_for_function("src => document.querySelector('#before img')?.src == src", arg=after)
    visit.click("#edit")  # from the result, which the page takes back
    visit.wait_for_function("src => document.querySelector('#after img')?.src != src", arg=after)


@in_browser
def test_questions_about_uploads_and_drawings_are_answered(visit):
    visit.get_by_role("tab", name="Chat").click()
    entry, answers = visit.locator("#entry textarea"), visit.locator(".chat .bot .message")
    upload(visit, "#entry", "circle.png", png(RED_CIRCLE))
    visit.wait_for_selector("#entry img")
    entry.fill("what colour is the circle?")
    entry.press("Enter")
    answers.get_by_text("red").wait_for()
    visit.get_by_role("button", name="New conversation").click()
    visit.wait_for_function("!document.querySelector('.chat').innerText.includes('red')")
    entry.fill("/draw three yellow stars")
    entry.press("Enter")
    visit.locator(".chat .bot img").first.wait_for()
    visit.wait_for_function("!document.querySelector('.chat').innerText.includes('Step')")
    entry.fill("what is in the picture?")
    entry.press("Enter")
    answers.get_by_text("a yellow star").wait_for()
