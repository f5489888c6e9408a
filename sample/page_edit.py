"""The tab that changes a picture."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from sample.page_parts import (
    AT_ONCE,
    FILES,
    JOB,
    Shown,
    checked,
    guidance_slider,
    image_field,
    seed_fields,
    shown,
    steps_slider,
)
from sample.settings import Drawing
from sample.studio import MOST_CHARACTERS, Studio, View, drawing_from, pictures_from, seed_from, written

INSTRUCTIONS = (
    "change the colour of the circle to yellow",
    "move the square to the top left corner",
    "delete the square",
)


def edit_tab(studio: Studio) -> None:
    """Its fields, and which button calls what."""
    with gr.Row():
        before = image_field(label="Before", sources=["upload"], height=340, elem_classes="pictures", elem_id="before")
        after = image_field(
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
            seed_field, fresh_field = seed_fields()
            with gr.Accordion("More settings", open=False):
                guidance = guidance_slider("Guidance by the instruction", Drawing().guidance.text)
                image_guidance = guidance_slider("Guidance by the picture", Drawing().guidance.image)
                steps = steps_slider()
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

        yield from shown(views, show, note)

    fields = [before, more, instruction, seed_field, fresh_field, steps, guidance, image_guidance]
    started: Any = [on(edit, fields, [after, note, seed_field], **JOB) for on in (button.click, instruction.submit)]
    cancel.click(lambda: "Cancelled", outputs=note, cancels=started, **AT_ONCE)
    onward.click(lambda path: path, after, before, **AT_ONCE)
    before.upload(checked, before, before, show_progress="hidden", api_visibility="private")
