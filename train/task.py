"""What the loop asks of one way of training: batches in, scalars out; models, data formats and losses stay inside.

A task is a config (a frozen dataclass, member of the union `train.config.TaskConfig`) whose `build` assembles the
modules and hands each trained one to an engine, and the built `Task` below. Everything else (counting, logging,
saving, resuming, stopping) is the loop's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from data.loader import Collate, Data, Loader
from data.shards import Shards
from train.engine import Engine, micro_batch_size
from train.optim import OptimConfig

if TYPE_CHECKING:
    from train.config import Run
    from train.ranks import Ranks


class Task(Protocol):
    """A built task. Subclass it: of what follows `step`, nothing does anything unless overridden."""

    engines: Mapping[str, Engine]
    """The trained modules by a short name; names become file names in the checkpoint."""

    def batches(self, samples: int) -> Iterator[Any]:
        """Endless micro-batches of this rank, from global sample number `samples` on (0 = a fresh run)."""
        ...

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Forward, `engine.backward(loss)` and `engine.step()` on one micro-batch; returns detached scalars to log.

        Keep the scalars on their device: the loop reads them every `log_every` steps. Keys are the same on all ranks.
        """
        ...

    def counts(self) -> dict[str, int]:
        """What this rank has counted since it started, summed over ranks in each log line; same keys on all ranks."""
        return {}

    def frozen(self) -> dict[str, str]:
        """sha256 of each part that is read and not trained, by name: a resumed run has to have the same."""
        return {}

    def reads(self) -> dict[str, str]:
        """sha256 of the data and its order, by name: a resumed run has to go on in the same."""
        return {}

    def measures(self) -> set[str]:
        """What the measures of `preview` are called."""
        return set()

    def preview(self, folder: Path, step: int) -> dict[str, float] | None:
        """Draw or answer fixed examples with the averaged weights; returns what rank 0 measured, if anything, for the log.
        Called on every rank; only rank 0 writes."""

    def release(self, folder: Path) -> None:
        """Write what users load, with the averaged weights. Called on every rank; only rank 0 writes."""


class LoaderTask(Task):
    """A task that reads a Loader's batches as they come."""

    loader: Loader

    def batches(self, samples: int) -> Iterator[Any]:
        """This rank's share, on the CPU."""
        self.loader.samples = samples
        return iter(self.loader)

    def counts(self) -> dict[str, int]:
        """Samples that could not be used and were replaced; where sources are mixed, what each has given."""
        read = {f"samples from {name}": count for name, count in self.loader.read.items()}
        return {"rejected": self.loader.rejects.total(), **(read if len(read) > 1 else {})}

    def reads(self) -> dict[str, str]:
        """Its sources, their shares and its seed."""
        return {"data": self.loader.fingerprint()}


def engine_for(module: nn.Module, run: Run, ranks: Ranks, optim: OptimConfig | None = None) -> Engine:
    """The engine that trains `module` with this run's optimizer (or another), precision, batch sizes and number of steps."""
    return Engine(
        module,
        optim=optim or run.optim,
        config=run.engine,
        ema=run.ema,
        ranks=ranks,
        batch_size=run.schedule.batch_size,
        accumulation=run.schedule.accumulation,
        total_steps=run.schedule.steps,
    )


def loader_for(collate: Collate, run: Run, ranks: Ranks, latents: bool = False) -> Loader:
    """This rank's share of the run's data, one micro-batch at a time. ValueError for buckets where `collate` has none, and
    for latents where a task takes none."""
    if not latents and any(isinstance(source, Shards) and source.latents is not None for source in run.data.sources):
        raise ValueError("data.sources latents: this task encodes every picture itself; leave them out")
    if getattr(collate, "buckets", None) is None:
        refuse_shapes(run.data)
    batch_size = run.schedule.batch_size
    size = micro_batch_size(batch_size, run.schedule.accumulation, ranks.world)
    return Loader(run.data, collate, size, ranks.rank, ranks.world, run.seed, batch_size)


def refuse_shapes(data: Data) -> None:
    """ValueError where a task that learns from squares alone is given pictures of many shapes."""
    if data.buckets is not None:
        raise ValueError(f"data.max_aspect is {data.max_aspect}, and this task learns from squares alone; set it to 1")


def check_buckets(data: Data, factor: int) -> None:
    """ValueError unless pictures of all shapes are whole numbers of cells of `factor` pixels a side."""
    if data.buckets is not None and data.bucket_step % factor:
        raise ValueError(f"data.bucket_step is {data.bucket_step}; VAE and decoder take multiples of {factor}, give one")
