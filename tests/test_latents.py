"""Latents of shards: what training reads in place of pictures is what it would have encoded, or it is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import precompute
from data.batch import LabelledCollate
from data.latents import latent_fingerprint
from data.loader import Data, open_source
from data.pack import Item, write_shards
from data.shards import Shards, ShardSource
from data.told import ClassesTold
from data.transforms import resize_and_crop, to_tensor
from model.vae import VAEConfig, load_vae
from tests import tiny
from tests.test_repae import FP32
from tests.test_shards import items, png, write_tar
from tests.tiny_repae import build, repae_run
from train import run
from train.config import Run
from train.metaquery import MetaQueryTask, MetaQueryTaskConfig
from train.ranks import start
from train.task import loader_for


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.metaquery_config(folder)
    return folder


@pytest.fixture
def shards(tmp_path):
    write_shards(items(7), lambda item: item, tmp_path / "set", shard_size=3)
    return tmp_path / "set"


def command(parts, shards, out, *more: str) -> int:
    given = [f"{shards}/*.tar", "--vae.path", str(parts / "vae"), "--image-size", "16", "--out", str(out), *more]
    return precompute.main(given)


def a_run(parts, shards, latents: Path | None) -> Run:
    base = run.named("metaquery.tiny")()
    assert isinstance(base.task, MetaQueryTaskConfig)
    source = Shards(f"{shards}/*.tar", latents=None if latents is None else str(latents))
    task = replace(base.task, model=tiny.metaquery_config(parts))
    return replace(
        base, task=task, data=Data(sources=(source,), image_size=16), schedule=replace(base.schedule, batch_size=4)
    )


def built(config: Run) -> MetaQueryTask:
    torch.manual_seed(0)
    assert isinstance(config.task, MetaQueryTaskConfig)
    return config.task.build(config, start(60))


def test_a_second_stage_reads_latents_in_place_of_its_frozen_vae(parts, tmp_path):
    """REPA on latents made once: the VAE is not asked, and what the SiT sees is the mean of what it would have said."""
    pictures = [Item("a", png((seed, 20 * seed, 99), (16, 16)), described={"label": seed % 2}) for seed in range(8)]
    write_shards(pictures, lambda item: item, tmp_path / "set", shard_size=4)
    assert command(parts, tmp_path / "set", tmp_path / "latents") == 0
    run = repae_run(parts, FP32, train_vae=False, told=ClassesTold(classes=2))
    source = Shards(f"{tmp_path}/set/*.tar", latents=str(tmp_path / "latents"))
    run = replace(run, data=Data(sources=(source,), task="labelled", image_size=16))
    task = build(run, start(60))
    task.coder.register_forward_hook(lambda *_: pytest.fail("the VAE was asked"))
    seen = []
    task.sit.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    batch = next(task.batches(0))
    task.step(batch)
    vae = load_vae(VAEConfig(str(parts / "vae"))).autoencoder
    with torch.no_grad():
        expected = vae.encode(batch.pixels).latent_dist.mode()
    torch.testing.assert_close(seen[0], expected, rtol=2e-3, atol=2e-3)  # float16
    with pytest.raises(ValueError, match="latents serve a VAE that stays"):
        build(replace(run, task=replace(run.task, train_vae=True)), start(60))
    with pytest.raises(ValueError, match="latents: this task encodes every picture itself"):
        loader_for(LabelledCollate(16), run, start(60))


def test_latents_are_those_that_training_would_encode(parts, shards, tmp_path):
    out = tmp_path / "latents"
    assert command(parts, shards, out, "--batch-size", "2") == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    vae = load_vae(VAEConfig(str(parts / "vae")))
    plain, encoded = ShardSource(f"{shards}/*.tar"), ShardSource(f"{shards}/*.tar", str(out))
    for number in range(7):
        given, expected = encoded.read(number), plain.read(number)
        pixels = to_tensor(resize_and_crop(expected["image"], 16))[None]
        assert given["image"] is None
        assert (given["key"], given["txt"], given["json"]) == (expected["key"], expected["txt"], expected["json"])
        assert given["latent"].dtype == np.float16
        np.testing.assert_allclose(given["latent"], vae.encode(pixels)[0].numpy(), rtol=1e-3, atol=1e-3)


def test_training_consumes_them_and_its_losses_are_those_of_pictures(parts, shards, tmp_path):
    assert command(parts, shards, tmp_path / "latents") == 0
    losses = []
    for latents in (None, tmp_path / "latents"):
        task = built(a_run(parts, shards, latents))
        batches = task.batches(0)
        losses.append([float(task.step(next(batches))["loss"]) for _ in range(3)])
    assert losses[0] != losses[1]  # float16
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_latents_of_another_autoencoder_size_or_precision_are_refused(parts, shards, tmp_path):
    assert command(parts, shards, tmp_path / "latents") == 0
    config = a_run(parts, shards, tmp_path / "latents")
    assert isinstance(config.task, MetaQueryTaskConfig)
    other = tiny.vae_folder(tmp_path / "other", seed=1)
    for vae in (VAEConfig(str(other)), VAEConfig(str(parts / "vae"), dtype="bfloat16")):
        model = replace(config.task.model, vae=vae)
        with pytest.raises(ValueError, match=r"were made with .* at 16 pixels, which is not this run's autoencoder"):
            built(replace(config, task=replace(config.task, model=model)))
    vae = load_vae(VAEConfig(str(parts / "vae")))
    assert latent_fingerprint(vae, 16) != latent_fingerprint(vae, 32)


def test_shards_that_were_packed_again_are_refused(parts, shards, tmp_path):
    assert command(parts, shards, tmp_path / "latents") == 0
    for path in shards.glob("*"):
        path.unlink()
    shards.rmdir()
    write_shards(items(6), lambda item: item, shards, shard_size=3)
    ShardSource(f"{shards}/00000.tar", str(tmp_path / "latents"))  # the same three samples in the same bytes
    write_shards(items(2), lambda item: item, tmp_path / "more" / "set", shard_size=3)
    with pytest.raises(ValueError, match=r"is not the one whose latents are in .*00000.tar; make them again"):
        ShardSource(f"{tmp_path}/more/set/*.tar", str(tmp_path / "latents"))


def test_parts_share_the_work_and_a_command_goes_on(parts, shards, tmp_path):
    out = tmp_path / "latents"
    assert command(parts, shards, out, "--part", "1/2") == 0
    assert [path.name for path in out.glob("*.tar")] == ["00001.tar"]
    with pytest.raises(ValueError, match=r"has none of shard 00000.tar; go on with python -m data.precompute"):
        ShardSource(f"{shards}/*.tar", str(out))
    stamp = (out / "00001.tar").stat().st_mtime_ns
    assert command(parts, shards, out, "--part", "0/1") == 0
    assert (out / "00001.tar").stat().st_mtime_ns == stamp
    assert len(ShardSource(f"{shards}/*.tar", str(out))) == 7


def test_a_picture_that_cannot_be_decoded_has_no_latent_and_training_replaces_it(parts, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    files = [(f"{n}.{ext}", data) for n in range(4) for ext, data in (("png", png((n, 0, 0))), ("txt", b"a red circle"))]
    files[2] = ("1.png", b"no picture")
    write_tar(tmp_path / "set" / "a.tar", files)
    assert command(parts, tmp_path / "set", tmp_path / "latents") == 0
    assert "1 samples refused" in capsys.readouterr().out
    task = built(a_run(parts, tmp_path / "set", tmp_path / "latents"))
    task.step(next(task.batches(0)))
    assert task.counts()["rejected"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "15"], "multiples of 2"),
        (["--part", "2/2"], "give I/N with I from 0 to N - 1"),
        (["--batch-size", "0"], "--batch-size is 0; give 1 or more"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_written(parts, shards, tmp_path, capsys, options, message):
    assert command(parts, shards, tmp_path / "latents", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()


def test_a_folder_of_other_latents_is_left_alone(parts, shards, tmp_path, capsys):
    out = tmp_path / "latents"
    assert command(parts, shards, out) == 0
    before = (out / "latents.json").read_bytes()
    assert command(parts, shards, out, "--image-size", "32") == 2
    assert "holds latents of another autoencoder, picture size or shards; name a new folder" in capsys.readouterr().err
    assert (out / "latents.json").read_bytes() == before
    assert json.loads(before)["image_size"] == 16


def test_reconstruction_still_sees_its_picture_and_chat_takes_no_latents(parts, shards, tmp_path):
    out = tmp_path / "latents"
    assert command(parts, shards, out) == 0
    config = a_run(parts, shards, out)
    task = built(replace(config, data=replace(config.data, task="i2i")))
    batch = next(task.batches(0))
    assert batch.latents is not None
    assert batch.prefix.images
    with pytest.raises(ValueError, match=r"data.task chat draws none; leave them out"):
        open_source(Data(task="chat"), Shards(f"{shards}/*.tar", latents=str(out)))


def test_an_empty_shard_and_strange_names_are_encoded_as_they_are_read(parts, tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    write_tar(folder / "a.tar", [("0.png", png((1, 0, 0))), ("0.txt", b"a red circle")])
    write_tar(folder / "b.tar", [])
    name = str(tmp_path / "run[[]1]")
    assert command(parts, name, tmp_path / "latents") == 0
    assert len(ShardSource(f"{name}/*.tar", str(tmp_path / "latents"))) == 1
