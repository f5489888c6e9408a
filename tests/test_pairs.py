"""Every MLLM family with every decoder: three steps through the real entry point, and a picture from the release."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Data
from model.connector import ConnectorConfig
from model.decoder import DecoderConfig, DiffusersDecoderConfig, SiTDecoderConfig
from model.diffusers_decoder import LoraConfig
from model.files import dump_config, read_tensors, write_json
from model.metaquery import MetaQueryConfig
from model.mllm import MLLMConfig
from model.vae import VAEConfig
from sample import publish
from sample.pipeline import Asked, Pipeline
from sample.settings import Drawing
from tests import tiny
from tests.tiny_decoders import PIPELINES
from tests.tiny_families import BLIND, SEEING
from train import run
from train.config import Run
from train.metaquery import MetaQueryTaskConfig
from train.preview import PreviewConfig
from train.ranks import start


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with every MLLM and every pipeline."""
    folder = tmp_path_factory.mktemp("parts")
    for name, make in (SEEING | BLIND | PIPELINES).items():
        make(folder / name)
    tiny.vae_folder(folder / "sit" / "vae")
    return folder


def a_run(parts, mllm: str, decoder: str, out, home: DecoderConfig | None = None, **changes) -> Run:
    """Three steps of `metaquery.tiny` with these parts."""
    if home is None:
        home = SiTDecoderConfig(sit=tiny.sit_config()) if decoder == "sit" else DiffusersDecoderConfig(str(parts / decoder))
    model = MetaQueryConfig(
        mllm=MLLMConfig(str(parts / mllm), dtype="float32"),
        decoder=home,
        vae=VAEConfig(str(parts / decoder / "vae") if decoder == "sit" else str(parts / decoder)),
        queries=4,
        connector=ConnectorConfig(layers=1),
        trainable=("*",),
    )
    base = run.named("metaquery.tiny")()
    return replace(
        base,
        task=MetaQueryTaskConfig(replace(model, **changes), preview=PreviewConfig((), steps=2)),
        data=Data(image_size=16),
        schedule=replace(base.schedule, steps=3, batch_size=2),
        out=out,
    )


def train(config, folder):
    """Through `python -m train.run RUN.json`."""
    write_json(folder / "run.json", dump_config(config))
    run.main([str(folder / "run.json")])
    return Pipeline.from_release(config.out / "release")


@pytest.mark.parametrize("decoder", ["sit", *PIPELINES])
@pytest.mark.parametrize("mllm", [*SEEING, *BLIND])
def test_every_pair_trains_and_draws_from_its_release(parts, mllm, decoder, tmp_path):
    pipeline = train(a_run(parts, mllm, decoder, tmp_path / "out"), tmp_path)
    pictures = (tiny.image(),) if mllm in SEEING else ()
    drawn = pipeline([Asked("a red circle", pictures), "a blue star"], [0, 1], Drawing(2))
    assert [picture.size for picture in drawn] == [(16, 16), (16, 16)]
    assert drawn[0].tobytes() != drawn[1].tobytes()


@pytest.mark.parametrize("trainable", [("*",), ("model.transformer_blocks.0.*",)])
def test_the_weights_of_a_decoder_that_was_trained_whole_are_in_its_release(parts, tmp_path, trainable):
    home = Path(shutil.copytree(parts / "sana", tmp_path / "sana"))
    config = a_run(parts, "qwen2", "sana", tmp_path / "out", home=DiffusersDecoderConfig(str(home)), trainable=trainable)
    drawn = train(config, tmp_path)(["a"], [0], Drawing(2))[0]
    next((home / "transformer").glob("*.safetensors")).unlink()
    if trainable == ("*",):
        assert Pipeline.from_release(tmp_path / "out" / "release")(["a"], [0], Drawing(2))[0].tobytes() == drawn.tobytes()
    else:
        with pytest.raises(ValueError, match=r"decoder.path .* cannot be loaded"):
            Pipeline.from_release(tmp_path / "out" / "release")


@pytest.mark.parametrize("decoder", PIPELINES)
def test_adapters_train_alone_and_come_back(parts, decoder, tmp_path):
    home = DiffusersDecoderConfig(str(parts / decoder), lora=LoraConfig(rank=2))
    config = a_run(parts, "qwen2", decoder, tmp_path / "out", home=home, trainable=())
    model = train(config, tmp_path).model
    own = model.own_tensors()
    adapters = {name for name in own if name.startswith("decoder.")}
    assert adapters
    assert all(".lora_" in name for name in adapters)
    assert any(own[name].abs().max() > 0 for name in adapters if ".lora_B." in name)  # zero at birth


@pytest.mark.parametrize("decoder", PIPELINES)
def test_adapters_start_from_a_release_whose_decoder_was_trained_whole(parts, decoder, tmp_path):
    """As a pipeline it is the home of what stays frozen; without, its tensors have no place."""
    train(a_run(parts, "qwen2", decoder, tmp_path / "out"), tmp_path)
    release, lora = tmp_path / "out" / "release", LoraConfig(rank=2)
    publish.main(["export", str(release), "--out", str(tmp_path / "dist"), "--layout", "diffusers", "--steps", "1"])
    home = DiffusersDecoderConfig(str(tmp_path / "dist"), lora=lora)
    config = a_run(parts, "qwen2", decoder, tmp_path / "on", home=home, trainable=())
    begun: Any = replace(config, task=replace(config.task, init=release)).build(start(60))
    trained = read_tensors(release / "model.safetensors")
    own = {name: tensor for name, tensor in begun.model.own_tensors().items() if ".lora_" not in name}
    assert own.keys() == {name for name in trained if not name.startswith("decoder.")}
    assert all(torch.equal(tensor, trained[name]) for name, tensor in own.items())
    network = begun.model.decoder.model.state_dict()
    frozen = {name.replace(".base_layer.", "."): tensor for name, tensor in network.items() if ".lora_" not in name}
    assert all(torch.equal(tensor, trained[f"decoder.model.{name}"]) for name, tensor in frozen.items())
    away = DiffusersDecoderConfig(str(parts / decoder), lora=lora)
    config = a_run(parts, "qwen2", decoder, tmp_path / "on", home=away, trainable=())
    with pytest.raises(ValueError, match=r"unknown tensors.*task\.init.*name that folder as decoder\.path"):
        replace(config, task=replace(config.task, init=release)).build(start(60))
