"""Conversations about pictures -> a multimodal LLM that answers: next-token prediction on the assistant's words.

The stages (configs/understand.py) differ in what trains and in what is talked about, as in LLaVA (Liu et al., 2023).
Letters: B batch, P prefix tokens, N tokens to predict, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2_5_VLForConditionalGeneration

from data.address import draw
from data.batch import ChatBatch, ChatCollate
from data.loader import Data, Loader, World
from data.records import Conversation
from data.world.conversations import Shares, conversation
from model.assets import locate
from model.embedded import EmbeddedConfig, make, save
from model.files import dump_config
from model.mllm import MLLMConfig, load
from model.prefix import DRAW_SYSTEM, IGNORED, Prefix, Turn
from model.qwen import Qwen2_5_VL, arguments
from sample.measures import show, write_json
from sample.world_answers import exams, understanding
from train.engine import Engine, micro_batch_size
from train.ranks import Ranks
from train.task import Task, engine_for

if TYPE_CHECKING:
    from train.config import Run

SYMBOLS = ((0x2600, 0x27BF), (0x1F300, 0x1FAFF))  # code points whose Unicode names the tokenizer learns to spell
GREETING = ("You are a helpful assistant.", "Hello! What can you do? I look at pictures and answer questions.")


@dataclass(frozen=True)
class UnderstandConfig:
    """Which MLLM learns, which of its parameters, and from which conversations."""

    init: Path | None = None
    """The model folder to go on from, such as the release of the stage before. None: a fresh one, made to `fresh`."""
    fresh: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    trainable: tuple[str, ...] = ("*",)
    """Patterns over the model's parameter names, e.g. model.visual.* for the vision tower with its merger."""
    attention: Literal["eager", "sdpa"] = "eager"
    """eager is the faster one for small models on a CPU, sdpa for large ones on a GPU."""
    shares: Shares | None = None
    """Talk about the generated world in these shares only. None: whatever data.sources hold."""
    max_answers: int = 4
    """Longer conversations are cut after so many."""
    group: int = 4
    """Batches are sorted by length in groups of so many, which saves padding; 1 keeps the loader's order."""
    text_conversations: int = 6000
    """How many the tokenizer of a fresh model is trained on."""
    exam_pictures: int = 100
    """Held-out pictures that each preview asks about; 0: no previews."""

    def __post_init__(self) -> None:
        for name in ("max_answers", "group", "text_conversations"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}; give 1 or more")

    def build(self, run: Run, ranks: Ranks) -> UnderstandTask:
        """Load the model (after making it, if it is fresh), choose what trains, and hand it to an engine."""
        if run.data.task != "chat":
            raise ValueError(f"data.task is {run.data.task}; an MLLM learns to answer from chat")
        source = self._source(run, ranks)
        mllm = load(MLLMConfig(str(source), dtype="float32"))
        if not isinstance(mllm, Qwen2_5_VL):
            raise ValueError(f"task.init {source} is a {type(mllm).__name__}; this task trains Qwen2.5-VL only")
        mllm.model.set_attn_implementation(self.attention)
        choose_trainable(mllm.model, self.trainable)
        speaker = Speaker(mllm.model).train()
        collate = GroupCollate(ChatCollate(mllm.builder), self.group, self.max_answers, run.seed)
        size = micro_batch_size(run.schedule.batch_size, run.schedule.accumulation, ranks.world)
        if self.shares is None:
            groups = Loader(run.data, collate, size * self.group, ranks.rank, ranks.world, run.seed)
        else:
            rows = range(ranks.rank, size * self.group * ranks.world, ranks.world)
            groups = Talk(_only_world(run.data), self.shares, collate, rows, run.data)
        return UnderstandTask(speaker, engine_for(speaker, run, ranks), groups, size, source, run, ranks)

    def _source(self, run: Run, ranks: Ranks) -> Path:
        """The folder to load. A fresh model is made once per run, so that a resumed one has the same tokenizer."""
        if self.init is not None:
            found = locate(str(self.init))
            if found is None:
                raise ValueError(f"task.init {self.init} does not exist; run the stage before it, or name a model folder")
            return found
        folder, recipe = run.folder / "fresh", json.dumps(dump_config(self.fresh) | {"text": self.text_conversations})
        note = run.folder / "fresh.json"
        problem = None
        if ranks.first and not (folder.is_dir() and note.is_file() and note.read_text() == recipe):
            try:
                make(folder, self.fresh, training_text(self.text_conversations))
                note.write_text(recipe)
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := ranks.share(problem):
            raise ValueError(f"task.fresh: {problem}")
        return folder


class Speaker(nn.Module):
    """Predicts the assistant's words, and only those: the logits of all other positions are never computed.

    Parameters are named as in the model's own files. A head that is tied to the token embeddings is theirs: registered
    under its own name as well, one tensor would have two owners.
    """

    def __init__(self, whole: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = whole.model
        self.lm_head = None if whole.lm_head.weight is whole.get_input_embeddings().weight else whole.lm_head
        self._whole = (whole,)

    @property
    def whole(self) -> Qwen2_5_VLForConditionalGeneration:
        """The model as transformers knows it, over the same parameters."""
        return self._whole[0]

    def forward(self, prefix: Prefix, said: Tensor) -> Tensor:
        """Prefix and which of its tokens are answers [B, P] bool -> logits [N, V] of those, row by row."""
        device = prefix.ids.device.type
        rounded = self.whole.dtype == torch.bfloat16  # then autocast has nothing to round; it would only slow down
        with torch.autocast(device, torch.bfloat16, enabled=torch.is_autocast_enabled(device) and not rounded):
            states = self.model(**arguments(prefix), use_cache=False).last_hidden_state  # [B, P, D]
            if prefix.pixels is None:  # every rank uses the same parameters, or ZeRO's collectives would not meet
                states = states + 0 * self._see_nothing(states.device)
            states = states[:, :-1][said[:, 1:]]  # [N, D]; a token is predicted from the one before it
            if self.lm_head is not None:
                return self.lm_head(states)
            return F.linear(states, self.model.get_input_embeddings().weight)

    def _see_nothing(self, device: torch.device) -> Tensor:
        """The mean over what the vision tower makes of the smallest picture, []."""
        vision = self.whole.config.vision_config
        side = vision.spatial_merge_size
        pixels = torch.zeros(side**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, device=device)
        grids = torch.tensor([[1, side, side]], device=device)
        return torch.cat(list(self.model.get_image_features(pixels, grids, return_dict=True).pooler_output)).mean()

    def _apply(self, fn, recurse=True):  # noqa: ANN001, ANN202 (torch's signature)
        """Moves and rounds as any module, but keeps buffers in float32: rounded rotary frequencies would teach the
        model positions that it does not have when it is loaded."""
        kept = {name: buffer.detach().clone() for name, buffer in self.named_buffers()}
        moved = super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            buffer.data = kept[name].to(buffer.device)
        return moved


class UnderstandTask(Task):
    """Trains an MLLM to say what the assistant says in its conversations."""

    def __init__(
        self, speaker: Speaker, engine: Engine, groups: Loader | Talk, size: int, source: Path, run: Run, ranks: Ranks
    ) -> None:
        assert isinstance(run.task, UnderstandConfig)
        self.engine, self.groups, self.source, self.ranks, self.run = engine, groups, source, ranks, run
        self.config = run.task
        self.batch = size * ranks.world  # samples of one micro-batch over all ranks
        self.engines = {"main": engine}

    def batches(self, samples: int) -> Iterator[ChatBatch]:
        """This rank's share, on the CPU; from the middle of a group, the rest of it first."""
        into = samples % (self.batch * self.config.group)
        self.groups.samples = samples - into
        return itertools.islice(itertools.chain.from_iterable(self.groups), into // self.batch, None)

    def step(self, batch: ChatBatch) -> dict[str, Tensor]:
        """Mean over the answer tokens of all ranks of -log p(token | what comes before it)."""
        batch = batch.to(self.ranks.device)
        said = batch.targets != IGNORED  # [B, P]
        wanted = batch.targets[:, 1:][said[:, 1:]]  # [N]
        # Each rank's mean would weigh a token by how few its rank has; the engine divides by `world`.
        weight = self.ranks.world / self.ranks.sum(torch.tensor(float(len(wanted)), device=wanted.device)).clamp(min=1)
        logits = self.engine(batch.prefix, said)  # [N, V]
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum") * weight
        self.engine.backward(loss)
        self.engine.step()
        return {"loss": loss.detach(), "token_accuracy": (logits.argmax(-1) == wanted).sum() * weight}

    def preview(self, folder: Path, step: int) -> None:
        """Ask what a release of this moment would be asked: previews/step-00000500.json, and a line of metrics.jsonl."""
        if not self.config.exam_pictures:
            return
        with TemporaryDirectory() as draft:
            self.release(Path(draft) / "release")
            if not self.ranks.first:
                return
            mllm = load(MLLMConfig(f"{draft}/release", dtype="bfloat16")).to(self.ranks.device)
        asked = exams(self.run.seed, "val", self.config.exam_pictures, self.run.data.image_size)
        measures = understanding(mllm, asked)
        write_json(folder / f"step-{step:08d}.json", measures)
        line = {"step": step, "event": "understanding"} | {name: round(m.value, 4) for name, m in measures.items()}
        with (self.run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        show(f"step {step}", measures)

    def release(self, folder: Path) -> None:
        """The averaged weights as a folder in the hub's layout."""
        with self.engine.averaged() as speaker:
            if self.ranks.first:
                assert isinstance(speaker, Speaker)
                save(folder, speaker.whole, self.source)


@dataclass(frozen=True)
class GroupCollate:
    """Conversation records -> `batches` batches, each of conversations about as long as each other."""

    chat: ChatCollate
    batches: int
    max_answers: int
    seed: int

    def check(self, record: Conversation) -> None:
        """BadSample where what is left of it after the cut cannot be read."""
        self.chat.check(self._cut(record))

    def __call__(self, records: Sequence[Conversation], indices: Sequence[int]) -> list[ChatBatch]:
        cut = [self._cut(record) for record in records]
        order, size = list(range(len(cut))), len(cut) // self.batches
        if self.batches > 1:
            order.sort(key=lambda row: _length(cut[row]))
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        parts.sort(key=lambda part: draw(self.seed, "group", min(indices[row] for row in part)))  # short ones not first
        return [self.chat([cut[row] for row in part], [indices[row] for row in part]) for part in parts]

    def _cut(self, record: Conversation) -> Conversation:
        answers = [place for place, turn in enumerate(record.turns) if turn.role == "assistant"]
        end = answers[: self.max_answers][-1] + 1
        return replace(record, turns=record.turns[:end])


class Talk(Dataset[list[ChatBatch]]):
    """Groups of batches of generated conversations in given shares; set `samples` to go on from there, as with a Loader."""

    def __init__(self, world: World, shares: Shares, collate: GroupCollate, rows: range, data: Data) -> None:
        self.samples = 0
        self._world, self._shares, self._collate, self._rows = world, shares, collate, rows
        self._size, self._workers = data.image_size, data.workers

    def __getitem__(self, position: int) -> list[ChatBatch]:
        numbers = [position + row for row in self._rows]
        return self._collate([Conversation(str(number), self._turns(number)) for number in numbers], numbers)

    def __iter__(self) -> Iterator[list[ChatBatch]]:
        """Groups from `samples` on, prepared by the config's workers."""
        positions = itertools.count(self.samples, self._rows.stop)
        generator = torch.Generator().manual_seed(0)  # DataLoader would draw from the global stream otherwise
        yield from DataLoader(
            self, batch_size=None, sampler=positions, num_workers=self._workers, collate_fn=_unchanged, generator=generator
        )

    def _turns(self, number: int) -> tuple[Turn, ...]:
        return conversation(self._world.seed, number, self._world.split, size=self._size, shares=self._shares)


def choose_trainable(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let exactly the parameters train whose name matches a pattern. Raises ValueError for a pattern that matches none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"task.trainable {pattern!r} matches no parameter; there are {', '.join(names[::40])}, ...")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def training_text(conversations: int) -> Iterator[str]:
    """What the tokenizer of a fresh model should spell well: the world's words, the names of emoji, common courtesies."""
    for index in range(conversations):
        yield from (turn.text for turn in conversation(1, index, size=8))
    for first, last in SYMBOLS:
        yield from (name.lower() for code in range(first, last) if (name := unicodedata.name(chr(code), "")))
    yield from (DRAW_SYSTEM, *GREETING) * 20


def _length(record: Conversation) -> int:
    """Near the number of its tokens: about one per word, five in the frame of a turn, sixteen or more in an image."""
    return sum(len(turn.text.split()) + 6 + 18 * len(turn.images) for turn in record.turns)


def _only_world(data: Data) -> World:
    if len(data.sources) != 1 or not isinstance(data.sources[0], World):
        raise ValueError("task.shares need the generated world as the one of data.sources; leave task.shares at None for others")
    return data.sources[0]


def _unchanged(group: list[ChatBatch]) -> list[ChatBatch]:
    return group
