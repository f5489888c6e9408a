"""Conversations about pictures -> a multimodal LLM that answers: next-token prediction on the assistant's words.

The stages (configs/understand.py) differ in what trains and in what is talked about, as in LLaVA (Liu et al., 2023).
Letters: B batch, P prefix tokens, N tokens to predict, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from data.batch import ChatBatch, ChatCollate
from data.loader import Loader
from data.world.conversations import Shares
from model.assets import fingerprint, locate
from model.embedded import WEIGHTS, EmbeddedConfig, make, save
from model.files import dump_config, sha256_of
from model.mllm import MLLMConfig, load
from model.prefix import IGNORED, Prefix
from model.qwen import Qwen2_5_VL
from model.trainable import choose_trainable
from model.vision import batch_equal_pictures
from sample.measures import show, write_json
from sample.world_answers import MEASURES, exams, understanding
from train.engine import Engine, micro_batch_size
from train.lock import alone_in
from train.ranks import Ranks
from train.see import places, through_noise
from train.talk import GroupCollate, Talk, only_world, training_text
from train.task import Task, engine_for, refuse_shapes

if TYPE_CHECKING:
    from train.config import Run


@dataclass(frozen=True)
class UnderstandTaskConfig:
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
    equal_pictures: bool = True
    """All pictures have one size, as the generated world's do; then the vision tower runs twice as fast."""
    max_answers: int = 4
    """Longer conversations are cut after so many."""
    place: float = 0.0
    """Weight of telling, through noise, from each visual token where in its picture it lies. Answers alone let the tower
    forget it, long before they ask for it. 0: none."""
    group: int = 4
    """Batches are sorted by length in groups of so many, on each rank, which saves padding; 1 keeps the loader's order. A
    run that goes on in the midst of a group is exact on as many ranks; on others, samples of that group may come twice or
    not at all."""
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
        refuse_shapes(run.data)
        source = self._source(run, ranks)
        mllm = load(MLLMConfig(str(source), dtype="float32"))
        if not isinstance(mllm, Qwen2_5_VL):
            raise ValueError(f"task.init {source} is a {type(mllm).__name__}; this task trains Qwen2.5-VL only")
        mllm.model.set_attn_implementation(self.attention)
        if self.equal_pictures:
            batch_equal_pictures(mllm.model.model.visual)
        choose_trainable(mllm.model, self.trainable)
        frozen = _frozen(mllm.model, source) if ranks.first else {}  # before an engine holds a part of each tensor alone
        speaker = Speaker(mllm.model, tell_places=self.place > 0).train()
        collate = GroupCollate(ChatCollate(mllm.builder), self.group, self.max_answers, run.seed)
        size = micro_batch_size(run.schedule.batch_size, run.schedule.accumulation, ranks.world)
        if self.shares is None:
            groups = Loader(run.data, collate, size * self.group, ranks.rank, ranks.world, run.seed)
        else:
            rows = range(ranks.rank, size * self.group * ranks.world, ranks.world)
            others = "task.shares need data.sources to be one generated world; leave task.shares at None for others"
            groups = Talk(only_world(run.data, others), self.shares, collate, rows, run.data)
        return UnderstandTask(speaker, engine_for(speaker, run, ranks), groups, size, source, frozen, run, ranks)

    def _source(self, run: Run, ranks: Ranks) -> Path:
        """The folder to load. A fresh model is made once per run, so that a resumed one has the same tokenizer."""
        if self.init is not None:
            found = locate(str(self.init))
            if found is None:
                raise ValueError(f"task.init {self.init} does not exist; run the stage before it, or name a model folder")
            return found
        folder, recipe = run.folder / "fresh", json.dumps(dump_config(self.fresh) | {"text": self.text_conversations})
        note = run.folder / "fresh.json"
        with alone_in(run.folder, ranks):  # another run may train there, from its own
            problem = None
            if ranks.first and not (folder.is_dir() and note.is_file() and note.read_text() == recipe):
                try:
                    if note.is_file() and any((run.folder / "checkpoints").glob("step-*")):
                        raise ValueError(
                            f"{folder} was made by other settings, which checkpoints are of; give another --out"
                        )
                    make(folder, self.fresh, training_text(self.text_conversations))
                    note.write_text(recipe)
                except (ValueError, OSError) as error:
                    problem = str(error)
            if problem := ranks.share(problem):
                raise ValueError(f"task.fresh: {problem}")
        return folder


class Speaker(nn.Module):
    """Predicts the assistant's words, and only those: the logits of all other positions are never computed.

    With `tell_places` it also says from each visual token where that token lies. Parameters are named as in the model's own
    files. A head that is tied to the token embeddings is theirs: registered under its own name as well, one tensor would
    have two owners.
    """

    def __init__(self, whole: Qwen2_5_VLForConditionalGeneration, tell_places: bool = False) -> None:
        super().__init__()
        self.model = whole.model
        vision: Any = whole.config.vision_config
        self.place = nn.Linear(vision.out_hidden_size, 2) if tell_places else None
        self._seen: list[Tensor] = []  # what the tower made of the pictures of the step under way
        if tell_places:
            visual: Any = self.model.visual
            visual.register_forward_hook(lambda tower, given, made: self._seen.append(made.pooler_output))
        self.lm_head = None if whole.lm_head.weight is whole.get_input_embeddings().weight else whole.lm_head
        self._whole = (whole,)

    @property
    def whole(self) -> Qwen2_5_VLForConditionalGeneration:
        """The model as transformers knows it, over the same parameters."""
        return self._whole[0]

    def forward(self, prefix: Prefix, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prefix and the places [N] before its answer tokens (`answers_of`) -> logits [N, V] of what follows there; and the
        squared error [] of the visual tokens' places, where it tells them."""
        self._seen.clear()
        states = self.model(**prefix.arguments(), use_cache=False).last_hidden_state  # [B, P, D]
        if not prefix.images:  # every rank uses the same parameters, or ZeRO's collectives would not meet
            states = states + 0 * self._see_nothing(states.device)
        states = states[:, :-1].flatten(0, 1)[before]  # [N, D]; a token is predicted from the one before it
        off = None
        if self.place is not None:
            told = self.place(through_noise(torch.cat(self._seen))).float()  # [visual tokens, 2]
            off = F.mse_loss(told, self._places(prefix, told))
        if self.lm_head is not None:
            return self.lm_head(states), off
        embeddings: Any = self.model.get_input_embeddings()
        return F.linear(states, embeddings.weight), off

    def _places(self, prefix: Prefix, told: Tensor) -> Tensor:
        """Column and row of every visual token, [visual tokens, 2]; what the tower saw in place of nothing is nowhere."""
        if not prefix.images:
            return told.detach()
        vision: Any = self.whole.config.vision_config
        merge = vision.spatial_merge_size
        grids = prefix.images["image_grid_thw"].tolist()
        return torch.cat([places(int(h) // merge, int(w) // merge) for _, h, w in grids]).to(told)

    def _see_nothing(self, device: torch.device) -> Tensor:
        """The mean over what the vision tower makes of the smallest picture, []."""
        vision: Any = self.whole.config.vision_config
        side = vision.spatial_merge_size
        pixels = torch.zeros(side**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, device=device)
        grids = torch.tensor([[1, side, side]], device=device)
        model: Any = self.model
        return torch.cat(list(model.get_image_features(pixels, grids, return_dict=True).pooler_output)).mean()


def _frozen(model: Qwen2_5_VLForConditionalGeneration, source: Path) -> dict[str, str]:
    """sha256 of what is read and not trained."""
    beside = sha256()
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS):
            beside.update(f"{file.name} {sha256_of(file)}\n".encode())
    kept = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {"tokenizer": beside.hexdigest(), **({"mllm": fingerprint(kept)} if kept else {})}


def answers_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Targets [B, P] -> of the B (P - 1) places that a token follows, those before an answer token [N], and that token [N].

    Call it where the targets lie on the CPU: counting on a GPU waits for it."""
    following = targets[:, 1:].flatten()
    before = (following != IGNORED).nonzero()[:, 0]
    return before, following[before]


class UnderstandTask(Task):
    """Trains an MLLM to say what the assistant says in its conversations."""

    def __init__(
        self,
        speaker: Speaker,
        engine: Engine,
        groups: Loader | Talk,
        size: int,
        source: Path,
        frozen: dict[str, str],
        run: Run,
        ranks: Ranks,
    ) -> None:
        assert isinstance(run.task, UnderstandTaskConfig)
        self.engine, self.groups, self.source, self.ranks, self.run = engine, groups, source, ranks, run
        self.config = run.task
        self.batch = size * ranks.world  # samples of one micro-batch over all ranks
        self._frozen = frozen
        self.engines = {"main": engine}

    def batches(self, samples: int) -> Iterator[ChatBatch]:
        """This rank's share, on the CPU; from the middle of a group, the rest of it first."""
        into = samples % (self.batch * self.config.group)
        self.groups.samples = samples - into
        return itertools.islice(itertools.chain.from_iterable(self.groups), into // self.batch, None)

    def step(self, batch: ChatBatch) -> dict[str, Tensor]:
        """Mean over the answer tokens of all ranks of -log p(token | what comes before it)."""
        before, wanted = (part.to(self.ranks.device) for part in answers_of(batch.targets))  # [N] each
        # Each rank's mean would weigh a token by how few its rank has; the engine divides by `world`.
        weight = self.ranks.world / self.ranks.sum(torch.tensor(float(len(wanted)), device=wanted.device)).clamp(min=1)
        logits, off = self.engine(batch.prefix.to(self.ranks.device), before)  # [N, V], []
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum") * weight
        measured = {"loss": loss.detach(), "token_accuracy": (logits.argmax(-1) == wanted).sum() * weight}
        objective = loss
        if off is not None:
            measured["place"] = off.detach()
            objective = loss + self.config.place * off
        self.engine.backward(objective)
        self.engine.step()
        return measured

    def counts(self) -> dict[str, int]:
        """Samples that could not be used and were replaced."""
        return {"rejected": self.groups.rejects.total()} if isinstance(self.groups, Loader) else {}

    def frozen(self) -> dict[str, str]:
        """The tokenizer with all that lies beside the weights, and the weights that do not train."""
        return self._frozen

    def reads(self) -> dict[str, str]:
        """The conversations and their order."""
        return {"data": self.groups.fingerprint()}

    def measures(self) -> set[str]:
        """Those of the exam."""
        return set(MEASURES) if self.config.exam_pictures else set()

    def preview(self, folder: Path, step: int) -> dict[str, float] | None:
        """Ask what a release of this moment would be asked: previews/step-00000500.json, and the shares of right answers."""
        if not self.config.exam_pictures:
            return None
        with self.engine.averaged() as speaker, ExitStack() as held:
            if not self.ranks.first:
                return None
            assert isinstance(speaker, Speaker)
            draft = held.enter_context(TemporaryDirectory())
            save(Path(draft) / "release", speaker.whole, self.source)
            mllm = load(MLLMConfig(f"{draft}/release", dtype="bfloat16")).to(self.ranks.device)
        asked = exams(self.run.seed, "val", self.config.exam_pictures, self.run.data.image_size)
        measures = understanding(mllm, asked)
        write_json(folder / f"step-{step:08d}.json", measures)
        show(f"step {step}", measures)
        return {name: round(measure.value, 4) for name, measure in measures.items()}

    def release(self, folder: Path) -> None:
        """The averaged weights as a folder in the hub's layout."""
        with self.engine.averaged() as speaker:
            if self.ranks.first:
                assert isinstance(speaker, Speaker)
                save(folder, speaker.whole, self.source)
