"""Pictures of classes: the same whatever the batch and the number of processes, gone on with, and packed."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.batch import LabelledBatch
from data.told import ClassesTold
from model.files import read_tensors, write_tensors
from model.noise import FlowConfig
from sample import classes
from sample.cli import run
from sample.labelled import load_decoder
from tests.test_repae import FP32
from tests.tiny_repae import build, repae_run
from train.ranks import start


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A decoder of three classes, as a run leaves it."""
    folder = tmp_path_factory.mktemp("classes")
    task = build(repae_run(folder, FP32, told=ClassesTold(classes=3), noise=FlowConfig(shift=2.0)), start(60))
    task.release(folder / "release")
    return folder / "release"


def drawn(release, out, *more: str) -> np.ndarray:
    """All pictures in `out`, [n, H, W, 3]."""
    classes.main(["--release", str(release), "--out", str(out), "--n", "7", "--steps", "3", *more])
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))])


def test_batches_and_processes_change_nothing(release, tmp_path, monkeypatch):
    whole = drawn(release, tmp_path / "a")
    assert len({picture.tobytes() for picture in whole}) == 7
    assert abs(drawn(release, tmp_path / "b", "--batch-size", "3") - whole).max() <= 1  # of 255: rounding
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shared = drawn(release, tmp_path / "c")
    assert abs(shared - whole).max() <= 1


def test_the_label_and_guidance_count(release, tmp_path):
    decoder = load_decoder(release)
    assert (decoder.classes, decoder.image_size) == (3, 16)
    assert decoder.noising.grid(2).tolist() == pytest.approx([1, 2 / 3, 0])  # the shift of its training
    labels = torch.tensor([0, 1])
    told = ClassesTold(classes=3).whole(LabelledBatch(labels, labels, torch.zeros(2, 3, 1, 1)), 0)
    one, other = decoder.draw(told, [5, 5], steps=2)
    assert not torch.equal(one, other)
    assert abs(drawn(release, tmp_path / "g", "--guidance", "2.5") - drawn(release, tmp_path / "p")).max() > 1
    random = [classes.label(classes.Args(release=release, labels="random"), n, 3) for n in range(300)]
    assert min(random.count(k) for k in range(3)) > 60
    assert [classes.label(classes.Args(release=release), n, 3) for n in range(4)] == [0, 1, 2, 0]


def test_it_goes_on_and_packs_for_adm(release, tmp_path, capsys):
    whole = drawn(release, tmp_path / "a")
    (tmp_path / "a" / "000003.png").unlink()
    again = drawn(release, tmp_path / "a", "--npz", str(tmp_path / "a.npz"))
    assert abs(again - whole).max() <= 1
    assert "1 pictures in" in capsys.readouterr().out
    packed = np.load(tmp_path / "a.npz")
    assert packed["arr_0"].shape == (7, 16, 16, 3)
    assert np.array_equal(packed["arr_0"], again)
    assert packed["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_pictures_of_other_weights_are_not_mixed(release, tmp_path, capsys):
    """A release is known by its tensors, whatever its folder is called."""
    for name in ("one", "two"):
        shutil.copytree(release, tmp_path / name)
    drawn(tmp_path / "one", tmp_path / "a")
    drawn(tmp_path / "two", tmp_path / "a")
    assert "pictures in" in capsys.readouterr().out
    path = tmp_path / "one" / "sit" / "labels.safetensors"
    write_tensors(path, {name: tensor + 1 for name, tensor in read_tensors(path).items()})
    assert (
        run(classes.main, ["--release", str(tmp_path / "one"), "--out", str(tmp_path / "a"), "--n", "8", "--steps", "3"])
        == 2
    )
    assert "was drawn with other settings" in capsys.readouterr().err
    assert len(list((tmp_path / "a").iterdir())) == 7


def test_bad_input_ends_in_a_sentence(release, tmp_path, capsys):
    drawn(release, tmp_path / "a")
    asked = ["--release", str(release), "--out", str(tmp_path / "a"), "--n", "7"]
    for argv, message in [
        ([*asked, "--steps", "4"], "was drawn with other settings; remove it"),
        (["--release", str(tmp_path), "--n", "1"], "has no sit; name the release"),
        ([*asked, "--n", "0"], "give --n, --batch-size and --steps of at least 1"),
    ]:
        assert run(classes.main, argv) == 2
        assert message in capsys.readouterr().err
