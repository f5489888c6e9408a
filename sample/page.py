"""The page: its look and its tabs; `sample/studio.py` and `sample/page_conversations.py` do the work."""

from typing import Any

import gradio as gr
from gradio.themes import Base, LocalFont, sizes

from sample.page_chat import chat_tab
from sample.page_conversations import Conversations
from sample.page_draw import draw_tab
from sample.page_edit import edit_tab
from sample.page_parts import visitor
from sample.studio import Studio

WAITING = 16  # jobs; further ones are refused
HOUR = 3600
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


def build(studio: Studio, conversations: Conversations) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="querybridge", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(
            "# querybridge\nOne frozen language model that sees pictures, talks about them and draws them.",
            elem_classes="head",
        )
        with gr.Tab("Draw"):
            draw_tab(studio)
        with gr.Tab("Edit"):
            edit_tab(studio)
        with gr.Tab("Chat"):
            chat_tab(conversations)

        def left(request: gr.Request) -> None:
            conversations.forget(visitor(request))

        page.unload(left)
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def look() -> dict[str, Any]:
    """What is set when the page is served."""
    return {"theme": THEME, "css": CSS}
