"""What the tabs of the page share: fields, how buttons call what takes long, and how what is wrong is said."""

import html
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from sample.cli import sentence
from sample.settings import Drawing
from sample.studio import MOST_GUIDANCE, MOST_STEPS, View, pictures_from

FILES = [".png", ".jpg", ".jpeg", ".webp"]
# the model does one job at a time, whichever tab asks; by "once", a button would stay dead after its job was cancelled
JOB: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "trigger_mode": "multiple",
    "show_progress": "hidden",
    "api_visibility": "private",
}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

Shown = dict[Any, Any]
"""Components and what they are to show."""


def image_field(**options: Any) -> gr.Image:
    """A picture that comes as the path of its file, not opened on the way: `open_picture` does, and says what is wrong with
    it. No subclass: of those gradio writes stubs among the sources."""
    picture: Any = gr.Image(type="filepath", **options)
    picture.preprocess = lambda payload: None if payload is None else payload.path or "upload"
    return picture


def seed_fields() -> tuple[gr.Number, gr.Checkbox]:
    """A seed, and whether each picture is to have a fresh one."""
    with gr.Row():
        return gr.Number(0, label="Seed", precision=0, minimum=0), gr.Checkbox(label="A new one each time")


def steps_slider() -> gr.Slider:
    """As many as `Drawing` has."""
    return gr.Slider(1, MOST_STEPS, Drawing().steps, step=1, label="Steps")


def guidance_slider(label: str, value: float) -> gr.Slider:
    """From what is ignored to what is followed most."""
    return gr.Slider(0, MOST_GUIDANCE, value, step=0.1, label=label)


def shown(views: Callable[[], Iterator[View]], show: Callable[[View], Shown], note: gr.Markdown) -> Iterator[Shown]:
    """What `show` makes of each view; what the user can mend is said in one sentence."""
    try:
        for view in views():
            yield show(view)
    except ValueError as error:
        warn(error)
        yield {note: ""}


def checked(path: str | None) -> str | None:
    """An upload that is a picture, or nothing and a sentence."""
    try:
        pictures_from([path] if path else [])
    except ValueError as error:
        warn(error)
        return None
    return path


def warn(error: ValueError) -> None:
    """Says what the user can mend in a corner of the page."""
    gr.Warning(html.escape(sentence(error), quote=False))


def visitor(request: gr.Request) -> str:
    """Names who looks at the page: one open tab of a browser."""
    return str(request.session_hash)
