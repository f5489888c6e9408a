"""A small real Task: queries, a frozen layer and a trained head on addressed data; any number of ranks sees the same."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.files import sha256_of
from train.checkpoint import Keep, manifest_of, path_of, rewrite
from train.ema import EmaConfig, decay
from train.engine import KINDS, Engine, EngineConfig, Step
from train.optim import OptimConfig, adamw, learning_rate
from train.ranks import Ranks, start
from train.saving import Saver
from train.task import Task

BATCH, STEPS = 8, 6
CLIP_NORM = 0.4  # below some gradient norms here and above others
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2)
EMA = EmaConfig(halflife_images=40)


class Net(nn.Module):
    """[B, 6] -> [B, 5]; odd sizes, so that no tensor divides evenly over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 7).requires_grad_(False)
        self.queries = nn.Parameter(torch.randn(3, 7) * 0.5)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        h = torch.tanh(self.frozen(x))[:, None] * self.queries  # [B, 3, 7]
        return self.head(self.norm(h)).mean(1)


def net() -> Net:
    """The same weights each time."""
    torch.manual_seed(7)
    return Net()


def rows(numbers: range) -> tuple[Tensor, Tensor]:
    """Inputs [B, 6] and targets [B, 5] of sample numbers."""
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    x, y = zip(*((torch.randn(6, generator=g), torch.randn(5, generator=g)) for g in generators), strict=True)
    return torch.stack(x), torch.stack(y)


class Toy(Task):
    """Regression. The loss of batches with a sample in `poison` is NaN, with one in `spike` a thousandfold."""

    def __init__(
        self,
        ranks: Ranks,
        config: EngineConfig,
        *,
        accumulation: int = 1,
        poison: frozenset[int] = frozenset(),
        spike: frozenset[int] = frozenset(),
    ) -> None:
        self.ranks, self.poison, self.spike = ranks, poison, spike
        self.micro = BATCH // accumulation
        self.engine = Engine(
            net(),
            optim=OPTIM,
            config=config,
            ema=EMA,
            ranks=ranks,
            batch_size=BATCH,
            accumulation=accumulation,
            total_steps=STEPS,
        )
        self.engines = {"main": self.engine}

    def batches(self, samples: int) -> Iterator[range]:
        while True:
            yield range(samples + self.ranks.rank, samples + self.micro, self.ranks.world)
            samples += self.micro

    def step(self, batch: range) -> dict[str, Tensor]:
        x, y = rows(batch)
        loss = (self.engine(x).float() - y).square().mean()
        if self.poison & set(batch):
            loss = loss * float("nan")
        if self.spike & set(batch):
            loss = loss * 1000
        self.engine.backward(loss)
        self.engine.step()
        return {"loss": loss.detach()}

    def release(self, folder: Path) -> None:
        with self.engine.averaged() as module:
            if self.ranks.first:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(module.state_dict(), folder / "net.pt")


def advance(task: Toy, first: int, last: int) -> list[Step]:
    """Optimizer steps `first` to `last`, exclusive; what each did."""
    batches, done = task.batches(first * BATCH), []
    for _ in range(first, last):
        for _ in range(BATCH // task.micro):
            task.step(next(batches))
        assert task.engine.last
        done.append(task.engine.last)
    return done


def accept(file: Path) -> None:
    """Let the checkpoint around a file take it as it is now."""
    manifest = manifest_of(file.parent)
    rewrite(file.parent, replace(manifest, sha256=manifest.sha256 | {file.name: sha256_of(file)}))


def save(task: Task, root: Path, step: int, keep: Keep = Keep(1), ranks: Ranks | None = None) -> Path:
    """A checkpoint of a task after `step` steps. Raises OSError when it cannot be written."""
    saver = Saver(root, task.engines, {"seed": 0}, keep, ranks or start(60))
    saver.begin(step, step * BATCH)
    saver.finish()
    return path_of(root, step)


def plain_torch(saved_at: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """What plain torch does on whole batches: losses, gradient norms, and the averages after `saved_at` steps."""
    module = net()
    optimizer = adamw(module, OPTIM)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    averages = {name: p.detach().clone() for name, p in trained.items()}
    losses, norms, saved = [], [], {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        x, y = rows(range(step * BATCH, (step + 1) * BATCH))
        loss = (module(x) - y).square().mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        keep = decay(EMA, (step + 1) * BATCH, BATCH)
        averages = {name: keep * old + (1 - keep) * trained[name].detach() for name, old in averages.items()}
        if step + 1 == saved_at:
            saved = averages
    return losses, norms, saved


def digest(engine: Engine) -> str:
    """One hash over everything a checkpoint would hold."""
    sha = hashlib.sha256(json.dumps(engine.counters()).encode())
    for kind in KINDS:
        for name, tensor in engine.tensors(kind):
            sha.update(name.encode() + tensor.numpy().tobytes())
    for name, buffer in engine.buffers().items():
        sha.update(name.encode() + buffer.numpy().tobytes())
    return sha.hexdigest()
