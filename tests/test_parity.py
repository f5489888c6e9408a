"""The release's MLLM against its base, through the real command; and that a changed one is found out."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from model import mllm
from model.mllm import MLLMConfig
from sample import evaluate
from sample.cli import run
from sample.measures import read_json, read_protocol
from sample.parity import Parity, compare
from tests import releases
from tests.tiny_families import BLIND, SEEING


def test_the_command_proves_it_and_writes_the_proof(tmp_path, capsys):
    release = releases.release(tmp_path)
    asked = f"parity --release {release} --images 2 --pixels 16 --tokens 4 --json {tmp_path}/parity.json"
    assert run(evaluate.main, asked.split()) == 0
    found, told = read_json(tmp_path / "parity.json"), read_protocol(tmp_path / "parity.json")
    assert [found[f"parity.{what}"].value for what in ("tensors", "logits", "answers")] == [1, 1, 1]
    assert found["parity.logits_difference"].value == 0
    assert found["parity.cached_difference"].value < 1e-4
    assert told["sha256"]["base"] == told["sha256"]["mllm"]
    assert run(evaluate.main, ["parity", "--release", str(release), "--images", "0"]) == 2
    assert "give --images" in capsys.readouterr().err


def test_one_changed_weight_is_found_and_ends_with_1(tmp_path, monkeypatch):
    release = releases.release(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained

    def changed(*args, **options):
        base = stock(*args, **options)
        model = base[0] if isinstance(base, tuple) else base
        if not options.get("output_loading_info"):  # ours is loaded with it, the base without
            with torch.no_grad():
                model.lm_head.weight[5] += 1
        return base

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", changed)
    asked = f"parity --release {release} --images 1 --pixels 16 --tokens 4 --json {tmp_path}/parity.json"
    with pytest.raises(SystemExit, match="1"):
        run(evaluate.main, asked.split())
    found = read_json(tmp_path / "parity.json")
    assert found["parity.tensors"].value < 1
    assert found["parity.logits"].value == 0
    assert found["parity.logits_difference"].value > 0


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3", "llama"])
def test_other_families_are_compared_as_well(family, tmp_path):
    """Read by other classes, with pictures and without; rows answered together say what each says alone."""
    folder = (SEEING | BLIND)[family](tmp_path / "mllm")
    ours = mllm.load(MLLMConfig(str(folder), dtype="float32"))
    base = ours.model_class.from_pretrained(folder, dtype=torch.float32).eval()
    found, sha256 = compare(ours, base, Parity(release=tmp_path, images=1, pixels=16, tokens=4, batch_size=4))
    assert [found[f"parity.{what}"].value for what in ("tensors", "answers")] == [1, 1]
    assert found["parity.logits_difference"].value < 1e-5
    assert found["parity.cached_difference"].value < 1e-4
    assert sha256 == ours.fingerprint()
