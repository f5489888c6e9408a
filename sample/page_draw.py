"""The tab that draws from words."""

from collections.abc import Iterator
from typing import Any, get_args

import gradio as gr

from sample.page_parts import AT_ONCE, JOB, Shown, guidance_slider, seed_fields, shown, steps_slider
from sample.settings import Drawing, SolverName
from sample.studio import MOST_CHARACTERS, MOST_PICTURES, Studio, View, drawing_from, seed_from

PROMPTS = (
    "a red circle left of a blue square",
    "three yellow stars on a black background",
    "a large green triangle above a small pink cross",
    "a cyan diamond and an orange star on a white background",
)


def draw_tab(studio: Studio) -> None:
    """Its fields, and which button calls what."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            prompt = gr.Textbox(
                label="Prompt", placeholder="What to draw", lines=2, max_length=MOST_CHARACTERS, autofocus=True
            )
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="draw-cancel")
            count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures")
            seed_field, fresh_field = seed_fields()
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="What to avoid", max_length=MOST_CHARACTERS)
                steps, guidance = steps_slider(), guidance_slider("Guidance", Drawing().guidance.text)
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

        yield from shown(views, show, note)

    fields = [prompt, negative, count, seed_field, fresh_field, steps, guidance, solver]
    started: Any = [on(draw, fields, [gallery, note, seed_field], **JOB) for on in (button.click, prompt.submit)]
    cancel.click(lambda: "Cancelled", outputs=note, cancels=started, **AT_ONCE)
