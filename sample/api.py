"""Requests in OpenAI's shapes -> questions and drawings, or a refusal.

A field that would change the answer and that we cannot heed is refused unless it says what happens anyhow (`n` 1 and
`top_p` 1 in a chat, no tools); one that changes nothing (`user`, `metadata`, `quality`) is ignored; one that nobody knows is
refused by name, as OpenAI does, since a misspelt `guidance` would else pass for a setting.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from http import HTTPStatus
from secrets import randbelow
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from data.transforms import TooManyPixels
from model.prefix import Turn
from sample.limits import Limits
from sample.pictures import read_picture
from sample.settings import MAX_SEED, Drawing, Guidance, SolverName
from sample.worker import Question

DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class Refused(HTTPException):
    """A request that is not served, and why."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        close, once = {"Connection": "close"}, {"x-should-retry": "false"}  # OpenAI's clients would ask three times
        headers = {408: close, 413: close, 429: {"Retry-After": "1"}, 500: once, 504: once}
        super().__init__(status, message, headers=headers.get(status))
        self.param, self.code = param, code or HTTPStatus(status).name.lower()

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def refused(error: ValidationError | Any) -> Refused:
    """What a schema says of the first field that is wrong; the value is not repeated."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refused(400, "the body is no JSON")
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    said = (
        "is no field that we know; leave it out"
        if first["type"] == "extra_forbidden"
        else first["msg"].removeprefix("Value error, ")
    )
    return Refused(422, f"{param or 'body'}: {said}", param)


def _only(*values: object) -> AfterValidator:
    def check(value: object) -> object:
        if value is not None and value not in values:
            raise ValueError(f"this server has only {' or '.join(map(repr, values)) or 'none'}; leave it out")
        return value

    return AfterValidator(check)


Ignored = object
"""Changes nothing here."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Shape(BaseModel):
    """Of a request."""

    model_config = ConfigDict(extra="forbid")


class Painting(Shape):
    """POST /v1/images/generations: the body; steps, guidance and what follows are ours (`extra_body`)."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    """WIDTHxHEIGHT in pixels, or auto: as the decoder was trained."""
    response_format: Annotated[str | None, _only("b64_json")] = None
    output_format: Annotated[str | None, _only("png")] = None
    stream: Annotated[bool | None, _only(False)] = None
    seed: Seed | None = None
    """Of the first picture, each further one is one higher; none: at random, and told."""
    steps: int | None = None
    guidance: Number | None = None
    image_guidance: Number | None = None
    negative: str = ""
    solver: SolverName | None = None
    background: Annotated[str | None, _only("auto", "opaque")] = None
    moderation: Ignored = None
    output_compression: Ignored = None
    partial_images: Ignored = None
    quality: Ignored = None
    style: Ignored = None
    user: Ignored = None

    def drawing(self, limits: Limits, side: int) -> Drawing:
        """The settings, of a decoder trained with pictures of side x side.

        Raises:
            Refused: more is asked for than the limits allow.
            ValueError: a setting is impossible.
        """
        if (self.n or 1) > limits.pictures:
            raise Refused(422, f"n: {self.n} is above {limits.pictures}; ask more than once", "n")
        check_texts([self.prompt, self.negative], limits)
        if (self.steps or 1) > limits.steps:
            raise Refused(422, f"steps: {self.steps} is above {limits.steps}; take fewer", "steps")
        width, height = self._size()
        if width * height > limits.enlarge * side * side:
            raise Refused(422, f"size: {self.size} is above {limits.enlarge:g} times {side}x{side}; take less", "size")
        given = {"text": self.guidance, "image": self.image_guidance}
        guidance = Guidance(**{name: value for name, value in given.items() if value is not None})
        settings = {"steps": self.steps, "solver": self.solver}
        settings = {name: value for name, value in settings.items() if value is not None}
        return Drawing(**settings, guidance=guidance, negative=self.negative, width=width, height=height)

    def seeds(self) -> list[int]:
        """One for each picture."""
        n = self.n or 1
        first = randbelow(2**31) if self.seed is None else self.seed
        if first > MAX_SEED - n:
            raise Refused(422, f"seed: {first} cannot be counted up from; take less", "seed")
        return [first + number for number in range(n)]

    def _size(self) -> tuple[int, int]:
        if self.size in (None, "auto"):
            return 0, 0
        found = SIZE.fullmatch(self.size)
        if not found:
            raise Refused(422, "size: give WIDTHxHEIGHT in pixels, such as 64x64, or auto", "size")
        return int(found[1]), int(found[2])


class Repainting(Painting):
    """POST /v1/images/edits: the fields of the form beside `image` or `image[]`."""

    input_fidelity: Ignored = None


class TextPart(Shape):
    """Of a message."""

    type: Literal["text"]
    text: str


class Url(Shape):
    """A picture within its address: `data:image/png;base64,...`."""

    url: str
    detail: Ignored = None


class ImagePart(Shape):
    """Of a message."""

    type: Literal["image_url"]
    image_url: Url


class Message(Shape):
    """Of a conversation. Whatever the order of its parts, the model sees pictures first."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: Ignored = None
    annotations: Ignored = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[object] | None, _only([])] = None

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """Of its pictures."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(Shape):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class ResponseFormat(Shape):
    """Plain text is all there is."""

    type: Literal["text"]


class Chat(Shape):
    """POST /v1/chat/completions: the body. A temperature that is not given is 0: the likeliest answer; above it, a seed that
    is not given is drawn by lot."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Annotated[int | None, _only(1)] = None
    top_p: Annotated[float | None, _only(1)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    logprobs: Annotated[bool | None, _only(False)] = None
    top_logprobs: Annotated[int | None, _only(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({})] = None
    tools: Annotated[list[object] | None, _only([])] = None
    tool_choice: Annotated[str | None, _only("none", "auto")] = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str] | None, _only(["text"])] = None
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None

    def question(self, limits: Limits) -> Question:
        """What is asked, its pictures decoded.

        Raises:
            Refused: more is given than the limits allow, a picture is none, or the turns are in no order to answer.
        """
        check_texts([message.text for message in self.messages], limits)
        tokens = self.max_completion_tokens or self.max_tokens
        if (tokens or 0) > limits.answer_tokens:
            raise Refused(422, f"max_tokens: {tokens} is above {limits.answer_tokens}; ask for less", "max_tokens")
        if self.messages[-1].role != "user":
            raise Refused(422, "messages: the last one must be the user's", "messages")
        urls = [url for message in self.messages for url in message.urls]
        pictures = iter(read_pictures([from_url(url) for url in urls], limits))
        turns = [
            Turn(_ROLES[message.role], message.text, tuple(next(pictures) for _ in message.urls))
            for message in self.messages
        ]
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Question(
            tuple(turns),
            tokens,
            self.temperature or 0.0,
            randbelow(2**31) if self.seed is None else self.seed,
            tuple(text for text in stop if text),
            limits.answer_tokens,
        )


_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raises Refused when they are too long together."""
    length = sum(map(len, texts))
    if length > limits.characters:
        raise Refused(422, f"the texts have {length} characters and the limit is {limits.characters}; shorten them")


def from_url(url: str) -> bytes:
    """What a data: URL holds. Nothing is ever fetched."""
    head = DATA_URL.match(url)
    if not head:
        if url[:5].lower() == "data:":
            raise Refused(415, "image_url: give a PNG, JPEG or WebP, as data:image/png;base64,...", "image_url")
        raise Refused(
            422, "image_url: this server fetches nothing; send the picture itself, as data:image/png;base64,...", "image_url"
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(422, "image_url: what follows base64, is no base64", "image_url") from error


def read_pictures(files: Sequence[bytes], limits: Limits) -> list[Image.Image]:
    """The pictures of a request, decoded.

    Raises:
        Refused: there are too many, one has too many pixels, or one is no picture.
    """
    if len(files) > limits.images:
        raise Refused(413, f"{len(files)} pictures are given and the limit is {limits.images}; give fewer", "image")
    pictures = []
    for number, file in enumerate(files):
        try:
            pictures.append(read_picture(file, f"picture {number}", int(limits.megapixels * 1e6)))
        except TooManyPixels as error:
            raise Refused(413, str(error), "image") from error
        except ValueError as error:
            raise Refused(415, str(error), "image") from error
    return pictures
