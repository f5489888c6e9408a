"""A look at a run before it trains: what is well is said, what would go wrong is named, nothing of the run is written."""

import os
import subprocess
from dataclasses import replace

import pytest

from data.pack import write_shards
from data.shards import Shards
from model.assets import ROOT
from sample.cli import run
from tests import tiny
from tests.test_shards import items
from tests.two_ranks import TORCHRUN, tiny_run
from train import doctor
from train.ranks import start
from train.run import named


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    tiny.metaquery_config(folder)
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal in which no sentence is broken."""
    monkeypatch.setenv("COLUMNS", "400")


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_run_that_would_go(parts, tmp_path, capsys):
    doctor.main(tiny_run(parts, tmp_path / "out"))
    text = said(capsys)
    for expected in ("torch", "one rank alone", "GB free", "a generated world", "loss", "a checkpoint takes"):
        assert expected in text, expected
    assert list(tmp_path.iterdir()) == []


def test_shards_that_are_not_indexed_are_counted(tmp_path):
    write_shards(items(20), lambda item: item, tmp_path / "set", shard_size=10)
    shards = replace(named("metaquery.emoji")().data, sources=(Shards(f"{tmp_path}/set/*.tar"),))
    looked = doctor.data(replace(named("metaquery.tiny")(), data=shards), start(60))
    assert looked.problem is None
    assert "2 shards" in looked.said
    assert "2 not indexed yet: python -m data.index" in looked.said


def test_what_would_go_wrong_is_named_and_the_rest_left(parts, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for options, message in [
        (["--data.image-size", "32"], "the decoder draws 16"),
        (["--schedule.keep", str(10**12)], "lower schedule.keep"),
        (["--out", str(file / "out")], "would go wrong"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            doctor.main(tiny_run(parts, tmp_path / "out", *options))
        assert message in said(capsys)
    assert run(doctor.main, ["metaquery.tinny"]) == 2


def test_two_ranks_are_looked_at_as_one(parts, tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "train.doctor"]
    done = subprocess.run(
        [*command, *tiny_run(parts, tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in ("2 rank(s)", "all-reduce of 16 MiB", "signals-to-handle", "stepped in"):
        assert expected in done.stdout, expected
