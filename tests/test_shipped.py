"""What ships with the code: every run builds on it, the MLLM answers, the demo goes through."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from data.shards import Shards
from model.assets import ROOT
from model.mllm import MLLMConfig, load
from sample.world_answers import exams, understanding
from train.metaquery import MetaQueryTaskConfig
from train.ranks import start
from train.run import named, names

ASSETS = ROOT / "assets" / "world"
ELSEWHERE = (
    "understand.",  # each starts from the release of another run: tests/test_understand.py
    *(f"repae.{size}_f" for size in ("s", "b", "l", "xl")),  # and ImageNet: tests/test_repae.py
    *("repae.world_ldm", "repae.decoder", "world.tuned_decoder"),  # each starts from another's release: tests/test_assets.py
    *(f"metaquery.{size}_" for size in ("base", "large", "xlarge")),  # gigabytes of weights: tests/test_plan.py
)
BUILDABLE = [name for name in names() if not name.startswith(ELSEWHERE)]


@pytest.mark.parametrize("name", BUILDABLE)
def test_every_run_builds_on_the_shipped_parts(name):
    run = named(name)()
    if any(isinstance(source, Shards) for source in run.data.sources):
        run = replace(
            run, data=replace(run.data, sources=named("metaquery.world")().data.sources)
        )  # its shards are the user's
    torch.manual_seed(0)
    assert run.task.build(run, start(60)).engines


def test_the_assets_are_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64 * 2**20
    assert max(path.stat().st_size for path in files) <= 24 * 2**20


def test_the_shipped_mllm_looks_at_the_picture():
    """A smaller exam than `sample.evaluate world`; the bound is far below what docs/results.md reports."""
    measures = understanding(load(MLLMConfig(str(ASSETS / "mllm"))), exams(0, "val", 60))
    assert measures["understanding.colour"].value > measures["understanding.blank.colour"].value + 0.3


def test_the_demo_goes_through(tmp_path):
    command = [
        sys.executable,
        "-m",
        "train.demo",
        "--out",
        str(tmp_path / "demo"),
        "--tell",
        "2",
        "--steps",
        "2",
        "--n",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo" / "before-and-after.png").stat().st_size > 10_000
    scores = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert {"generation.colour", "generation.binding"} <= set(scores)
    assert (tmp_path / "demo" / "run" / "release" / "model.safetensors").is_file()


def test_a_demo_run_trains_the_bridge_and_what_reads_it():
    task = named("metaquery.demo")().task
    assert isinstance(task, MetaQueryTaskConfig)
    assert task.model.trainable
    assert not any(pattern == "*" for pattern in task.model.trainable)
