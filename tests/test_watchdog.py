"""A hang ends the process, which says where; what takes its time within its limit goes on."""

import subprocess
import sys
from dataclasses import fields

import pytest

from model.assets import ROOT
from train.watchdog import HUNG, PARTS, WatchConfig, Watchdog

HANGS = """
import sys, time
from pathlib import Path
from tests.test_loop import CONFIG, SCHEDULE, Toy
from tests.toy import BATCH
from train.loop import fit
from train.metrics import MetricsConfig
from train.ranks import start
from train.watchdog import WatchConfig

class Hanging(Toy):
    def step(self, batch):
        if batch[0] == 3 * BATCH:
            time.sleep(600)
        return super().step(batch)

ranks = start(60)
fit(Hanging(ranks, CONFIG), SCHEDULE, seed=0, folder=Path(sys.argv[1]), config={}, resume="auto", metrics=MetricsConfig(),
    ranks=ranks, watch=WatchConfig(step_seconds=20))
"""


def test_a_step_that_hangs_ends_the_run_and_says_where(tmp_path):
    """Long before the step would end; the checkpoint before it stays."""
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == HUNG, done.stderr[-2000:]
    assert "rank 0 hangs: a step (watch.step_seconds) has taken over 20 s at step 4, samples 24 to 31" in done.stderr
    assert "in step" in done.stderr  # the stack that hangs
    assert (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_what_keeps_its_limit_goes_on():
    with Watchdog(WatchConfig(step_seconds=5, save_seconds=0), 0, tick_seconds=0.01) as dog:
        for _ in range(3):
            with dog.limit("step"):
                assert dog._due is not None
            assert dog._due is None  # between two limits there is none
        with dog.limit("save"):
            assert dog._due is None


def test_every_limit_is_a_setting():
    assert {f"{part}_seconds" for part in PARTS} == {field.name for field in fields(WatchConfig)}


def test_no_limit_is_negative():
    with pytest.raises(ValueError, match=r"watch.save_seconds is -1; give 0 \(no limit\) or more"):
        WatchConfig(save_seconds=-1)
