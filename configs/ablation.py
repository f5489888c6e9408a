"""What each part of the bridge is worth: runs that differ in one setting, over the same samples.

`python -m train.ablation` trains and scores them all. Nine learn by drawing alone (`metaquery.world`, from nothing), as
published; `queries_16` is their reference, with a connector of two layers. The `told_` ones learn by telling alone
(`metaquery.tell`), which takes six queries or more; `told_16` is theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs.metaquery import tell, world
from model.connector import ConnectorConfig
from train.config import Run
from train.ema import EmaConfig
from train.loop import Schedule
from train.metaquery import MetaQueryTaskConfig
from train.tell import TellTaskConfig


def queries_1() -> Run:
    """All that is to be drawn in one token.

    python -m train.run ablation.queries_1
    """
    return _changed("queries_1", queries=1)


def queries_4() -> Run:
    """Four queries.

    python -m train.run ablation.queries_4
    """
    return _changed("queries_4", queries=4)


def queries_16() -> Run:
    """The reference: `metaquery.world` from nothing, for fewer steps.

    python -m train.run ablation.queries_16
    """
    return _changed("queries_16")


def queries_64() -> Run:
    """As many queries as the decoder takes.

    python -m train.run ablation.queries_64
    """
    return _changed("queries_64", queries=64)


def random_queries() -> Run:
    """Queries that stay as they were drawn: only connector and decoder learn.

    python -m train.run ablation.random_queries
    """
    return _changed("random_queries", learned_queries=False)


def prompt_states() -> Run:
    """The MLLM's last states of the prompt itself, in place of queries.

    python -m train.run ablation.prompt_states
    """
    return _changed("prompt_states", read="prompt")


def connector_0() -> Run:
    """The queries' states through a projection alone.

    python -m train.run ablation.connector_0
    """
    return _changed("connector_0", connector=ConnectorConfig(layers=0))


def connector_6() -> Run:
    """A connector of six layers.

    python -m train.run ablation.connector_6
    """
    return _changed("connector_6", connector=ConnectorConfig(layers=6))


def unaligned() -> Run:
    """The published loss alone: nothing tells the bridge what its decoder knows of each point.

    python -m train.run ablation.unaligned
    """
    run = _changed("unaligned")
    assert isinstance(run.task, MetaQueryTaskConfig)
    return replace(run, task=replace(run.task, align=0.0))


def told_6() -> Run:
    """Told: a query for the scene and one for each object, none to spare.

    python -m train.run ablation.told_6
    """
    return _told("told_6", queries=6)


def told_16() -> Run:
    """The reference of those that are told: `metaquery.tell` for fewer steps.

    python -m train.run ablation.told_16
    """
    return _told("told_16")


def told_64() -> Run:
    """Told: as many queries as the decoder takes.

    python -m train.run ablation.told_64
    """
    return _told("told_64", queries=64)


def told_random_queries() -> Run:
    """Told: queries that stay as they were drawn.

    python -m train.run ablation.told_random_queries
    """
    return _told("told_random_queries", learned_queries=False)


def told_connector_0() -> Run:
    """Told: the queries' states through a projection alone.

    python -m train.run ablation.told_connector_0
    """
    return _told("told_connector_0", connector=ConnectorConfig(layers=0))


def told_connector_6() -> Run:
    """Told: a connector of six layers.

    python -m train.run ablation.told_connector_6
    """
    return _told("told_connector_6", connector=ConnectorConfig(layers=6))


def _changed(name: str, **changes: Any) -> Run:
    run = world()
    assert isinstance(run.task, MetaQueryTaskConfig)
    return _short(run, replace(run.task, model=replace(run.task.model, **changes)), name, steps=400)


def _told(name: str, **changes: Any) -> Run:
    run = tell()
    assert isinstance(run.task, TellTaskConfig)
    return _short(run, replace(run.task, model=replace(run.task.model, **changes)), name, steps=800)


def _short(run: Run, task: MetaQueryTaskConfig | TellTaskConfig, name: str, steps: int) -> Run:
    return replace(
        run,
        name=name,
        task=task,
        schedule=Schedule(steps=steps, batch_size=64, log_every=10, save_every=100),
        optim=replace(run.optim, warmup_steps=40),
        ema=EmaConfig(halflife_images=2_000),
    )
