"""The page's look, and which button calls what; `sample/studio.py` and `sample/conversations.py` do the work."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import gradio as gr
from gradio.themes import Base, LocalFont, sizes

from sample.cli import sentence
from sample.conversations import Conversations, Message
from sample.settings import Drawing, SolverName
from sample.studio import (
    MOST_CHARACTERS,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_STEPS,
    Studio,
    View,
    drawing_from,
    pictures_from,
    seed_from,
    written,
)

WAITING = 16  # jobs; further ones are refused
HOUR = 3600
PROMPTS = (
    "a red circle left of a blue square",
    "three yellow stars on a black background",
    "a large green triangle above a small pink cross",
    "a cyan diamond and an orange star on a white background",
)
INSTRUCTIONS = (
    "change the colour of the circle to yellow",
    "move the square to the top left corner",
    "delete the square",
)
FILES = [".png", ".jpg", ".jpeg", ".webp"]
THEME = Base(
    primary_hue="indigo",
    neutral_hue="slate",
    radius_size=sizes.radius_lg,
    font=[LocalFont("IBM Plex Sans", weights=(400,)), "sans-serif"],  # its other weights lack letters
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_text_color="white",
    button_large_text_weight="500",
)
CSS = """
.gradio-container, .gradio-container .app {width: 100%; max-width: 1080px !important; margin: 0 auto !important}
.head h1 {margin: 0; font-size: 1.4rem}
.head p {margin: 0; opacity: .75}
.note {min-height: 1.5em; opacity: .75}
.pictures img {width: 100%; height: 100%; object-fit: contain}  /* small pictures are shown large */
.chat .message img {width: 240px; height: 240px; object-fit: contain}
.chat button[title="Share"] {display: none}  /* nothing leaves this machine */
"""
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
Entry = Mapping[str, Any]
"""`text`, and the paths of `files`."""
Talk = Callable[[str, object, Sequence[object]], Iterator[list[Message]]]


def build(studio: Studio, conversations: Conversations) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="querybridge", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(
            "# querybridge\nOne frozen language model that sees pictures, talks about them and draws them.",
            elem_classes="head",
        )
        with gr.Tab("Draw"):
            _draw_tab(studio)
        with gr.Tab("Edit"):
            _edit_tab(studio)
        with gr.Tab("Chat"):
            _chat_tab(conversations)

        def left(request: gr.Request) -> None:
            conversations.forget(_visitor(request))

        page.unload(left)
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def look() -> dict[str, Any]:
    """What is set when the page is served."""
    return {"theme": THEME, "css": CSS}


def _draw_tab(studio: Studio) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            prompt = gr.Textbox(
                label="Prompt", placeholder="What to draw", lines=2, max_length=MOST_CHARACTERS, autofocus=True
            )
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="draw-cancel")
            count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures")
            seed, fresh = _seed()
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="What to avoid", max_length=MOST_CHARACTERS)
                steps, guidance = _steps(), _guidance("Guidance", Drawing().guidance.text)
                solver = gr.Dropdown(list(get_args(SolverName)), value=Drawing().solver, label="Solver")
            gr.Examples([[each] for each in PROMPTS], prompt, label="Examples", api_visibility="private")
        with gr.Column(scale=5):
            gallery = gr.Gallery(
                show_label=False,
                format="png",
                columns=2,
                height=560,
                object_fit="contain",
                buttons=["download", "fullscreen"],
                elem_classes="pictures",
            )
            note = gr.Markdown(elem_classes="note", elem_id="draw-note")

    def draw(prompt, negative, count, seed, fresh, steps, guidance, solver) -> Iterator[Shown]:
        def views() -> Iterator[View]:
            drawing = drawing_from(steps, guidance, solver, negative)
            return studio.draw(prompt, count=count, seed=seed_from(seed, fresh), drawing=drawing)

        def show(view: View) -> Shown:
            captions = (f"seed {view.seed + i}" if view.done else view.note.lower() for i in range(MOST_PICTURES))
            pictures = {gallery: list(zip(view.pictures, captions, strict=False))} if view.pictures else {}
            return {note: view.note, seed_field: view.seed, **pictures}

        yield from _shown(views, show, note)

    seed_field = seed
    fields = [prompt, negative, count, seed, fresh, steps, guidance, solver]
    started: Any = [on(draw, fields, [gallery, note, seed], **JOB) for on in (button.click, prompt.submit)]
    cancel.click(lambda: "Cancelled", outputs=note, cancels=started, **AT_ONCE)


def _edit_tab(studio: Studio) -> None:
    with gr.Row():
        before = _picture(label="Before", sources=["upload"], height=340, elem_classes="pictures", elem_id="before")
        after = _picture(
            label="After",
            format="png",
            interactive=False,
            height=340,
            elem_classes="pictures",
            elem_id="after",
            buttons=["download", "fullscreen"],
        )
    note = gr.Markdown(elem_classes="note", elem_id="edit-note")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5):
            instruction = gr.Textbox(label="Instruction", placeholder="What to change", max_length=MOST_CHARACTERS)
            with gr.Row():
                button = gr.Button("Edit", variant="primary", min_width=100, elem_id="edit")
                cancel = gr.Button("Cancel", min_width=100)
                onward = gr.Button("Use as source", min_width=100)
            gr.Examples([[each] for each in INSTRUCTIONS], instruction, label="Examples", api_visibility="private")
        with gr.Column(scale=4):
            seed, fresh = _seed()
            with gr.Accordion("More settings", open=False):
                guidance = _guidance("Guidance by the instruction", Drawing().guidance.text)
                image_guidance = _guidance("Guidance by the picture", Drawing().guidance.image)
                steps = _steps()
                more = gr.File(label="Further pictures", file_count="multiple", file_types=FILES, height=120)

    def edit(before, more, instruction, seed, fresh, steps, guidance, image_guidance) -> Iterator[Shown]:
        def views() -> Iterator[View]:
            sources = pictures_from([*([before] if before else []), *(more or [])])
            if not sources:
                raise ValueError("before: there is no picture; upload one")
            drawing = drawing_from(steps, guidance, image_guidance=image_guidance)
            words = written("instruction", instruction)
            return studio.draw(words, seed=seed_from(seed, fresh), drawing=drawing, sources=sources)

        def show(view: View) -> Shown:
            return {note: view.note, seed_field: view.seed, **({after: view.pictures[0]} if view.pictures else {})}

        yield from _shown(views, show, note)

    seed_field = seed
    fields = [before, more, instruction, seed, fresh, steps, guidance, image_guidance]
    started: Any = [on(edit, fields, [after, note, seed], **JOB) for on in (button.click, instruction.submit)]
    cancel.click(lambda: "Cancelled", outputs=note, cancels=started, **AT_ONCE)
    onward.click(lambda path: path, after, before, **AT_ONCE)
    before.upload(_checked, before, before, show_progress="hidden", api_visibility="private")


def _chat_tab(conversations: Conversations) -> None:
    chat = gr.Chatbot(
        show_label=False,
        height=520,
        layout="bubble",
        buttons=[],
        feedback_options=None,
        elem_classes="chat",
        placeholder="Ask about a picture, or have one drawn: **Draw**, or begin with `/draw`.",
    )
    entry = gr.MultimodalTextbox(
        show_label=False,
        placeholder="A question, with pictures if you like",
        file_types=FILES,
        file_count="multiple",
        sources=["upload"],
        elem_id="entry",
    )
    with gr.Row():
        button = gr.Button("Draw", variant="primary", min_width=100, elem_id="chat-draw")
        stop = gr.Button("Stop", min_width=100)
        reset = gr.Button("New conversation", min_width=100)

    def send(asked: Entry, request: gr.Request) -> Iterator[Shown]:
        command, _, rest = str(asked["text"] or "").strip().partition(" ")
        if command == "/reset":
            yield {chat: forget(request), entry: None}
        elif command == "/draw":
            yield from talk(conversations.draw, rest, asked, request)
        else:
            yield from talk(conversations.say, asked["text"], asked, request)

    def draw(asked: Entry, request: gr.Request) -> Iterator[Shown]:
        yield from talk(conversations.draw, asked["text"], asked, request)

    def talk(act: Talk, text: object, asked: Entry, request: gr.Request) -> Iterator[Shown]:
        visitor, emptied = (
            _visitor(request),
            {entry: None},
        )  # once: the next question may be begun while this one is answered
        try:
            for messages in act(visitor, text, asked["files"]):
                yield {chat: messages, **emptied}
                emptied = {}
        except ValueError as error:
            _warn(error)
            yield {chat: conversations.messages(visitor), entry: asked}

    def forget(request: gr.Request) -> list[Message]:
        conversations.forget(_visitor(request))
        return []

    def said(request: gr.Request) -> list[Message]:
        return conversations.messages(_visitor(request))

    started: Any = [
        entry.submit(send, entry, [chat, entry], **JOB),
        button.click(draw, entry, [chat, entry], **JOB),
    ]
    stop.click(said, outputs=chat, cancels=started, **AT_ONCE)
    reset.click(forget, outputs=chat, cancels=started, **AT_ONCE)
    chat.clear(forget, outputs=chat, cancels=started, **AT_ONCE)


def _picture(**options: Any) -> gr.Image:
    """A picture that comes as the path of its file, not opened on the way: `open_picture` does, and says what is wrong with
    it. No subclass: of those gradio writes stubs among the sources."""
    picture: Any = gr.Image(type="filepath", **options)
    picture.preprocess = lambda payload: None if payload is None else payload.path or "upload"
    return picture


def _seed() -> tuple[gr.Number, gr.Checkbox]:
    with gr.Row():
        return gr.Number(0, label="Seed", precision=0, minimum=0), gr.Checkbox(label="A new one each time")


def _steps() -> gr.Slider:
    return gr.Slider(1, MOST_STEPS, Drawing().steps, step=1, label="Steps")


def _guidance(label: str, value: float) -> gr.Slider:
    return gr.Slider(0, MOST_GUIDANCE, value, step=0.1, label=label)


def _shown(views: Callable[[], Iterator[View]], show: Callable[[View], Shown], note: gr.Markdown) -> Iterator[Shown]:
    """What `show` makes of each view; what the user can mend is said in one sentence."""
    try:
        for view in views():
            yield show(view)
    except ValueError as error:
        _warn(error)
        yield {note: ""}


def _checked(path: str | None) -> str | None:
    """An upload that is a picture, or nothing and a sentence."""
    try:
        pictures_from([path] if path else [])
    except ValueError as error:
        _warn(error)
        return None
    return path


def _warn(error: ValueError) -> None:
    gr.Warning(html.escape(sentence(error), quote=False))


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)
