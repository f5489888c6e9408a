"""Raw samples -> typed records, one dataclass per task.

A raw sample is what a source gives for one number: {"key": str, "image": PIL.Image | None, "txt": str, "json": dict}
and, where a sample has further images, "sources": tuple of PIL images in order, and of an edit "mask": PIL image.
What cannot become a record raises BadSample; the loader counts it by reason and takes another sample in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from model.prefix import Turn

Task = Literal["t2i", "chat", "edit", "i2i", "instruct", "labelled"]
DRAWN: tuple[Task, ...] = ("t2i", "edit", "i2i", "instruct")  # tasks whose samples end in a picture to draw
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
IMAGE_MARKER = "<image>"  # where an image stands in a message's text, in LLaVA's and ShareGPT's files


class BadSample(Exception):
    """A sample that cannot be used. `reason` is one of few fixed phrases, so that rejects can be counted by it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class TextToImage:
    """A caption and the picture it describes."""

    key: str
    caption: str
    image: Image.Image | None  # None: its latent is known
    scene: dict[str, Any] | None = None  # what the picture shows, where its source knows
    latent: np.ndarray | None = None  # float16 [c, h, w], of unit variance


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's; every assistant turn is a training target."""

    key: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Edit:
    """Source pictures and an instruction -> the picture it asks for. Covers edit, i2i (no text) and instruct."""

    key: str
    sources: tuple[Image.Image, ...]
    instruction: str
    image: Image.Image | None  # None: its latent is known
    mask: Image.Image | None = None  # grey: white where the edit changes the picture, where its source knows
    latent: np.ndarray | None = None  # float16 [c, h, w], of unit variance


@dataclass(frozen=True)
class Labelled:
    """A picture with a class number, or with the scene it was rendered from."""

    key: str
    image: Image.Image
    label: int | dict[str, Any]
    latent: np.ndarray | None = None  # float16 [c, h, w], of unit variance


Record = TextToImage | Conversation | Edit | Labelled


def to_record(task: Task, raw: dict[str, Any]) -> Record:
    """The record that `task` trains on; BadSample where the raw sample lacks what the task needs."""
    key = raw["key"]
    if task == "t2i":
        return TextToImage(key, _caption(raw), _drawn(raw), _scene(raw["json"]), raw.get("latent"))
    if task == "chat":
        return Conversation(key, _turns(raw))
    if task == "labelled":
        return Labelled(key, _image(raw), label_of(raw["json"]), raw.get("latent"))
    sources = tuple(raw.get("sources", ()))
    if task == "i2i" and not sources:
        sources = (_image(raw),)  # reconstruction: the picture is its own source
    if not sources:
        raise BadSample("no source image")
    return Edit(key, sources, "" if task == "i2i" else _caption(raw), _drawn(raw), raw.get("mask"), raw.get("latent"))


def parse_messages(messages: Sequence[Any], images: Sequence[Image.Image]) -> tuple[Turn, ...]:
    """Messages of OpenAI's, LLaVA's or ShareGPT's files -> turns.

    An image marker gives the next image to the turn it stands in; without any marker all images go to the first user
    turn."""
    parsed = [_message(message) for message in messages]
    if not any(role == "user" for role, _ in parsed) or parsed[-1][0] != "assistant":
        raise BadSample("messages do not end with an answer to a user")
    marked = [text.count(IMAGE_MARKER) for _, text in parsed]
    if sum(marked) == 0 and images:
        marked[[role for role, _ in parsed].index("user")] = len(images)
    if sum(marked) != len(images):
        raise BadSample("messages name another number of images than the sample has")
    turns, given = [], 0
    for (role, text), count in zip(parsed, marked, strict=True):
        text = text.replace(IMAGE_MARKER, "").strip()
        turns.append(Turn(role, text, tuple(images[given : given + count])))
        given += count
    return tuple(turns)


def _message(message: Any) -> tuple[Literal["system", "user", "assistant"], str]:
    if not isinstance(message, dict):
        raise BadSample("a message is not an object")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise BadSample("a message lacks a known role or its text")
    return ROLES[role], _unicode(content)


def _part(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image" | "image_url"}:
            return IMAGE_MARKER
    raise BadSample("a message has a part that is neither text nor image")


def messages_of(described: dict[str, Any]) -> list[Any]:
    """The messages of a sample's json, not yet parsed; BadSample where there are none."""
    messages = described.get("messages", described.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise BadSample("no messages")
    return messages


def _turns(raw: dict[str, Any]) -> tuple[Turn, ...]:
    messages = messages_of(raw["json"])
    images = tuple(raw.get("sources", ())) or ((raw["image"],) if raw["image"] is not None else ())
    return parse_messages(messages, images)


def _caption(raw: dict[str, Any]) -> str:
    caption = raw["txt"] or raw["json"].get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("no caption")
    return _unicode(caption.strip())


def _unicode(text: str) -> str:
    """The text. BadSample for half of a surrogate pair, which JSON may hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample("a text is not Unicode") from error
    return text


def _drawn(raw: dict[str, Any]) -> Image.Image | None:
    """The picture to draw; its latent stands for it."""
    return None if raw.get("latent") is not None else _image(raw)


def _image(raw: dict[str, Any]) -> Image.Image:
    if raw["image"] is None:
        raise BadSample("no image")
    return raw["image"]


def _scene(described: dict[str, Any]) -> dict[str, Any] | None:
    """What a picture was rendered from; in other data sets `scene` is the name of a place, which is passed over."""
    scene = described.get("scene")
    return scene if isinstance(scene, dict) else None


def label_of(described: dict[str, Any]) -> int | dict[str, Any]:
    """The scene or the class number of a sample's json, where a member `cls` has put it too; BadSample where there is
    neither."""
    label = _scene(described) or described.get("label")
    if isinstance(label, bool) or not isinstance(label, int | dict):
        raise BadSample("no label")
    if isinstance(label, int) and label < 0:
        raise BadSample("a label is below 0")
    return label
