"""Means are over the window, the file never doubles a step, and every line is strict JSON."""

import json

import torch

from train.metrics import Metrics, MetricsConfig, Window
from train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def strict(path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_window_means_and_empties():
    window = Window()
    for value in (1.0, 2.0, 6.0):
        window.add({"loss": torch.tensor(value), "other": torch.tensor(-value)})
    window.add({"loss": torch.tensor(7.0), "new": torch.tensor(5.0)})  # scalars come and go
    assert window.means(ALONE) == {"loss": 4.0, "new": 5.0, "other": -3.0}
    assert window.means(ALONE) == {}


def test_resumed_file_has_each_step_once(tmp_path, capsys):
    config = MetricsConfig()
    with Metrics(tmp_path, config, ALONE, first_step=0, steps=10) as log:
        for step in range(1, 6):
            log.log(step, {"loss": float(step)})
        log.event(5, "saved", path="x")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    with Metrics(tmp_path, config, ALONE, first_step=3, steps=10) as log:
        log.log(4, {"loss": 40.0})
    lines = strict(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert "step 4/10  loss 40.0000" in capsys.readouterr().out


def test_what_is_not_finite_becomes_null(tmp_path):
    with Metrics(tmp_path, MetricsConfig(), ALONE, first_step=0, steps=1) as log:
        log.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    with Metrics(tmp_path, MetricsConfig(), Ranks(1, 2, torch.device("cpu")), first_step=0, steps=1) as log:
        log.log(1, {"loss": 1.0})
        log.event(1, "saved")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
