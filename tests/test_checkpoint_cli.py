"""Checkpoints from the command line: listed, verified, and turned into the release that their run would write."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.pack import write_shards
from data.shards import Shards
from model import store
from model.files import dump_config, read_json, write_json
from sample.cli import run
from tests import tiny
from tests.test_shards import items
from tests.two_ranks import tiny_run
from train import run as training
from train.checkpoint_cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps that saved at the third and the last."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.metaquery_config(folder)
    training.main(tiny_run(folder, folder / "run"))
    return folder / "run"


def test_a_run_is_listed_and_verified(trained, capsys):
    main(["ls", str(trained)])
    said = capsys.readouterr().out
    assert "step-00000003" in said
    assert "step-00000006" in said
    main(["verify", str(trained)])
    assert capsys.readouterr().out.count("whole") == 2
    main(["verify", str(trained / "checkpoints" / "step-00000003")])
    assert capsys.readouterr().out.count("whole") == 1


def test_the_last_checkpoint_exports_to_the_runs_own_release(trained, tmp_path):
    main(["export", str(trained / "checkpoints" / "step-00000006"), "--out", str(tmp_path / "release")])
    ours, theirs = (store.load(folder).state_dict() for folder in (tmp_path / "release", trained / "release"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    main(["export", str(trained / "checkpoints" / "step-00000003"), "--out", str(tmp_path / "earlier")])
    earlier = store.load(tmp_path / "earlier").state_dict()
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in earlier.items())


def test_an_export_needs_no_shards(trained, tmp_path):
    write_shards(items(8), lambda item: item, tmp_path / "set")
    given = training.parse(tiny_run(trained.parent, tmp_path / "run", "--schedule.steps", "1", "--schedule.save-every", "1"))
    data = replace(given.data, sources=(Shards(f"{tmp_path}/set/*.tar"),))
    write_json(tmp_path / "run.json", dump_config(replace(given, data=data)))
    training.main([str(tmp_path / "run.json")])
    shutil.rmtree(tmp_path / "set")
    main(["export", str(tmp_path / "run/checkpoints/step-00000001"), "--out", str(tmp_path / "release")])
    ours, theirs = (store.load(folder).state_dict() for folder in (tmp_path / "release", tmp_path / "run" / "release"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_queries_that_stay_as_they_were_drawn_are_drawn_again(trained, tmp_path):
    options = ["--task.model.no-learned-queries", "--seed", "3", "--schedule.steps", "1"]
    training.main([*tiny_run(trained.parent, tmp_path / "run"), *options])
    (path,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    torch.manual_seed(0)
    main(["export", str(path), "--out", str(tmp_path / "release")])
    ours, theirs = (store.load(folder).state_dict() for folder in (tmp_path / "release", tmp_path / "run" / "release"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_mean_of_two_releases_lies_in_the_middle(trained, tmp_path, capsys):
    main(["export", str(trained / "checkpoints" / "step-00000003"), "--out", str(tmp_path / "earlier")])
    both = [str(tmp_path / "earlier"), str(trained / "release")]
    main(["mean", *both, "--out", str(tmp_path / "mean")])
    first, last, middle = (store.load(Path(folder)).own_tensors() for folder in (*both, tmp_path / "mean"))
    assert middle.keys() == first.keys()
    for name, tensor in middle.items():
        torch.testing.assert_close(tensor, (first[name] + last[name]) / 2)
    assert any(not torch.equal(tensor, last[name]) for name, tensor in middle.items())
    other = tmp_path / "other"
    shutil.copytree(trained / "release", other)
    config = read_json(other / "config.json")
    config["model"]["noise"]["shift"] = 7.0
    (other / "config.json").write_text(json.dumps(config))
    for releases, message in ((both[:1], "name two releases or more"), ([*both, str(other)], "has other settings")):
        assert run(main, ["mean", *releases, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_damaged_or_none_is_said(trained, tmp_path, capsys):
    file = trained / "checkpoints" / "step-00000006" / "main.exp_avg.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(SystemExit, match="1"):
            main(["verify", str(trained)])
        said = capsys.readouterr()
        assert f"{file} is damaged" in said.err
        assert said.out.count("whole") == 1
        assert run(main, ["export", str(file.parent), "--out", str(tmp_path / "release")]) == 2
        assert not (tmp_path / "release").exists()
    finally:
        file.write_bytes(whole)
    for argv in (["ls", str(tmp_path)], ["verify", str(tmp_path)], ["export", str(tmp_path), "--out", str(tmp_path / "x")]):
        assert run(main, argv) == 2
