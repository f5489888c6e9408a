"""What a frozen MLLM has read of one conversation, kept: one key/value cache for talking and drawing.

Each turn reads only what is new: the longest common prefix of what is known and what is asked, by ids and images, is taken
from the cache. An image that a model looks at differently once another joins it (`ImageReader`) is read again."""

from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import replace
from itertools import takewhile

from PIL import Image

from model.frozen import Ended, FrozenMLLM, Tail
from model.prefilled import Prefilled
from model.prefix import ImageReader, Row, Seen, Turn, digest_of


class Dialogue:
    """A conversation that is read as it grows, changes or begins anew; each call gives the whole of it."""

    def __init__(self, mllm: FrozenMLLM):
        self.mllm = mllm
        self.tokens_read = 0  # how many went through the model, what it said itself included
        self._read: tuple[Row, Prefilled] | None = None  # replaced as a whole, so that nothing can break it off half-way
        self._builder = copy(mllm.builder)
        self._builder.max_text_tokens = mllm.context  # that of prompts is the bound of what is trained on
        self._images = None if mllm.builder.images is None else _Remembered(mllm.builder.images)
        self._builder.images = self._images

    def read(self, turns: Sequence[Turn], room: int = 0) -> Prefilled:
        """The conversation up to where the assistant is to answer, as one row.

        Raises:
            ValueError: a text is too long, an image is none, or `room` tokens more do not fit into the model's context.
        """
        row = self._builder.row(turns)
        length = len(row.ids)
        if length + room > self.mllm.context:
            raise ValueError(
                f"the conversation has {length} tokens, what follows may have {room} "
                f"and the model reads {self.mllm.context}; shorten it, or begin a new one"
            )
        known, count = self._beginning(row)
        prefix = self._builder.batch([row])
        if known is None:
            head = self._builder.draw_head
            known = self.mllm.prefill(replace(prefix, head=head if tuple(row.ids[: len(head)]) == head else ()))
        elif count < length:
            new = [image for image, start in zip(row.images, row.starts, strict=True) if start >= count]
            known = self.mllm.extend(known, prefix.after(count, new))
        else:
            known = replace(known, next_positions=prefix.positions.amax().reshape(1).to(self.mllm.device) + 1)
        self._read = row, known
        self.tokens_read += length - count
        if self._images is not None:
            self._images.forget_all_but(row.images)
        return known

    def reply(
        self, turns: Sequence[Turn], max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> Generator[str, None, Ended]:
        """Stream the answer to the conversation; see `FrozenMLLM.reply`. What is said stays in the cache. Errors as `read`,
        at once."""
        tail = self.mllm.after(self.read(turns, room=max_new_tokens))
        assert self._read is not None
        return self._spoken(self._read[0], tail, max_new_tokens, temperature, seed)

    def _spoken(
        self, row: Row, tail: Tail, max_new_tokens: int, temperature: float, seed: int
    ) -> Generator[str, None, Ended]:
        try:
            return (yield from self.mllm.speak(tail, max_new_tokens, temperature, seed))
        finally:
            said = Row([*row.ids, *map(int, tail.ids)], images=row.images, starts=row.starts)
            self._read = said, tail.prefilled()
            self.tokens_read += len(tail.ids)

    def _beginning(self, row: Row) -> tuple[Prefilled | None, int]:
        """What is known of the first tokens of `row`, and how many they are."""
        if self._read is None:
            return None, 0
        old, known = self._read
        count = _shared(old, row)
        return (known.first(count), count) if count else (None, 0)


def _shared(old: Row, new: Row) -> int:
    """How many of the first tokens are the same, never a part of an image."""
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old.ids, new.ids, strict=False)))
    seen = zip(old.images, old.starts, strict=True)
    for image, start in zip(new.images, new.starts, strict=True):
        if start < count and (next(seen, None) != (image, start) or start + len(image.tokens) > count):
            return start
    return count


class _Remembered:
    """An image reader that looks at each image once, and says of the same image the same thing."""

    def __init__(self, reader: ImageReader):
        self.reader = reader
        self.image_id, self.single_differs = reader.image_id, reader.single_differs
        self._seen: dict[tuple[bytes, bool], Seen] = {}

    def __call__(self, image: Image.Image, alone: bool) -> Seen:
        """See `ImageReader`."""
        key = digest_of(image), alone and self.single_differs
        if key not in self._seen:
            self._seen[key] = self.reader(image, alone)
        return self._seen[key]

    def forget_all_but(self, kept: Sequence[Seen]) -> None:
        ids = {id(seen) for seen in kept}
        self._seen = {key: seen for key, seen in self._seen.items() if id(seen) in ids}
