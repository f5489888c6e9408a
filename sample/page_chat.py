"""The tab that converses about pictures and draws them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from sample.page_conversations import Conversations, Message
from sample.page_parts import AT_ONCE, FILES, JOB, Shown, visitor, warn

Entry = Mapping[str, Any]
"""`text`, and the paths of `files`."""
Talk = Callable[[str, object, Sequence[object]], Iterator[list[Message]]]


def chat_tab(conversations: Conversations) -> None:
    """Its fields, and which button calls what."""
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
        who = visitor(request)
        emptied: Shown = {entry: None}  # once: the next question may be begun while this one is answered
        try:
            for messages in act(who, text, asked["files"]):
                yield {chat: messages, **emptied}
                emptied = {}
        except ValueError as error:
            warn(error)
            yield {chat: conversations.messages(who), entry: asked}

    def forget(request: gr.Request) -> list[Message]:
        conversations.forget(visitor(request))
        return []

    def said(request: gr.Request) -> list[Message]:
        return conversations.messages(visitor(request))

    started: Any = [
        entry.submit(send, entry, [chat, entry], **JOB),
        button.click(draw, entry, [chat, entry], **JOB),
    ]
    stop.click(said, outputs=chat, cancels=started, **AT_ONCE)
    reset.click(forget, outputs=chat, cancels=started, **AT_ONCE)
    chat.clear(forget, outputs=chat, cancels=started, **AT_ONCE)
