"""The study of joint training goes through on small runs, and sets arms side by side over seeds."""

import json

import pytest
from PIL import Image

from sample.measures import Measure, read_json
from train import repae_study
from train.repae_study import ARMS, over_seeds


def test_means_over_seeds_have_students_interval():
    found = over_seeds([{"a.b": Measure(value, unit="dB")} for value in (1.0, 2.0, 3.0)])["a.b"]
    assert (found.value, found.n, found.unit) == (2.0, 3, "dB")
    assert found.high == pytest.approx(2 + 4.303 / 3**0.5, rel=1e-3)


def test_seeds_are_checked_before_anything_trains(tmp_path):
    for seeds in (["1", "1"], ["0", "1", "2", "3", "4", "5"]):
        with pytest.raises(ValueError, match="seeds: give different ones, at most 5"):
            repae_study.main(["--seeds", *seeds, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_finished_study_is_set_side_by_side_and_drawn(tmp_path, monkeypatch):
    """From the files that runs leave: nothing is trained again."""
    monkeypatch.setattr(repae_study, "train", lambda *_: pytest.fail("trained again"))
    for number, arm in enumerate(ARMS):
        for seed in (0, 1):
            folder = tmp_path / "runs" / f"{arm}-{seed}-7"
            folder.mkdir(parents=True)
            value = {"value": number + seed, "low": None, "high": None, "n": 5, "unit": ""}
            names = ("decoder.local_feature_distance", "decoder.velocity_loss", "vae.psnr", "vae.spatial_variance")
            (folder / "scores-5.json").write_text(json.dumps(dict.fromkeys(names, value)))
            lines = [{"step": step, "loss": 2 / step} for step in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    given = ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "table"), "--plot", str(tmp_path / "plot.png")]
    repae_study.main([*given, "--seeds", "0", "1", "--steps", "7", "--images", "5"])
    assert read_json(tmp_path / "table" / "naive.json")["vae.psnr"].value == 4.5
    assert Image.open(tmp_path / "plot.png").width > 1000
