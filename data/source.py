"""Sample number -> raw sample: what every place that data comes from has in common.

Random access is what makes order, resume and the number of ranks arithmetic: a loader computes which number comes next and
asks for it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from data.records import Task
from data.world.captions import describe
from data.world.conversations import conversation
from data.world.edits import edit_sample
from data.world.render import render
from data.world.scene import make_scene, random_for
from model.prefix import Turn


class Source(Protocol):
    """Raw samples by number: {"key": str, "image": PIL.Image | None, "txt": str, "json": dict}, maybe "sources"."""

    def __len__(self) -> int:
        """How many samples there are; 0 means endless."""
        ...

    def read(self, index: int) -> dict[str, Any]:
        """Sample number `index`; may raise BadSample."""
        ...

    def fetch(self, indices: Sequence[int]) -> None:
        """What can be done at once for samples that are read next."""
        ...

    def origin(self, index: int) -> str:
        """Where sample number `index` lies, for people."""
        ...

    def fingerprint(self) -> str:
        """What changes when a number comes to stand for another sample."""
        ...


class WorldSource:
    """The generated world, endless: the samples that `python -m data.world shards` would write, made when asked for."""

    def __init__(self, seed: int, split: str, task: Task, size: int = 64):
        make_scene(seed, 0, split)  # an unknown split is refused here, not in a worker
        self.seed, self.split, self.task, self.size = seed, split, task, size

    def __len__(self) -> int:
        return 0

    def fetch(self, indices: Sequence[int]) -> None:
        """Nothing: they are made one by one."""

    def origin(self, index: int) -> str:
        """The split."""
        return self.split

    def fingerprint(self) -> str:
        """Its settings."""
        return repr((self.seed, self.split, self.task, self.size))

    def read(self, index: int) -> dict[str, Any]:
        """A picture of `size` pixels with a caption and its scene, a conversation, or an edit, as the task needs."""
        key = f"{self.split}-{index:09d}"
        if self.task == "chat":
            turns = conversation(self.seed, index, self.split, size=self.size)
            images = [image for turn in turns for image in turn.images]
            messages = [_message(turn) for turn in turns]
            return {"key": key, "image": images[0] if images else None, "txt": "", "json": {"messages": messages}}
        if self.task in ("edit", "instruct"):
            return edit_sample(self.seed, index, self.split, self.size)
        scene = make_scene(self.seed, index, self.split)
        caption = describe(scene, random_for(self.seed, "caption", self.split, index))
        picture = Image.fromarray(render(scene, self.size))
        return {"key": key, "image": picture, "txt": caption.text, "json": {"scene": scene.to_json()}}


def _message(turn: Turn) -> dict[str, str]:
    return {"role": turn.role, "content": "<image>" * len(turn.images) + turn.text}
