import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import store
from model.assets import ROOT, locate, portable
from model.decoder import SiTDecoderConfig, save_sit
from model.metaquery import build
from model.noise import DiffusionConfig
from model.sit import SiT
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def model(folder):
    config = tiny.metaquery_config(folder)
    save_sit(folder / "decoder", SiT(tiny.sit_config()))
    home = SiTDecoderConfig(path=str(folder / "decoder"))
    torch.manual_seed(1)
    return build(replace(config, decoder=home, trainable=("sit.blocks.*",), noise=DiffusionConfig("v")))


@pytest.fixture
def release(model, tmp_path):
    store.save(tmp_path / "release", model)
    return tmp_path / "release"


def change(release, edit):
    path = release / "config.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def test_a_release_comes_back_bit_for_bit(model, release):
    again = store.load(release)
    assert again.config == model.config
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    prefix, x_t, t = model.mllm.builder(tiny.conversations()), torch.randn(3, 4, 8, 8), torch.rand(3)
    assert torch.equal(model.eval()(prefix, x_t, t), again(prefix, x_t, t))


def test_a_decoder_that_an_engine_rounded_is_still_the_one_at_its_path(model, tmp_path):
    def embedding(of):
        return of.state_dict()["decoder.sit.embed.weight"]

    rounded = build(model.config)
    for parameter in rounded.decoder.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    assert not torch.equal(embedding(rounded), embedding(model))
    store.save(tmp_path / "release", rounded)
    assert torch.equal(embedding(store.load(tmp_path / "release")), embedding(model))


def test_it_holds_what_was_trained_and_names_the_rest(model, release):
    stored = load_file(release / "model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert stored.keys() == trained
    frozen = json.loads((release / "config.json").read_text())["frozen"]
    assert frozen["mllm"]["sha256"] == model.mllm.fingerprint()
    assert frozen.keys() == {"mllm", "vae", "decoder"}


def test_a_decoder_without_a_home_is_stored_whole(folder, tmp_path):
    config = replace(tiny.metaquery_config(folder), trainable=(), learned_queries=False)
    model = build(config)
    store.save(tmp_path / "release", model)
    again = store.load(tmp_path / "release")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_averaged_weights_replace_the_raw_ones(model, tmp_path):
    average = {"queries.vectors": torch.full((4, 32), 0.5)}
    store.save(tmp_path / "release", model, average)
    assert (store.load(tmp_path / "release").state_dict()["queries.vectors"] == 0.5).all()
    assert not (model.queries.vectors == 0.5).any()


def test_saving_replaces_a_release_whole_or_not_at_all(model, release, monkeypatch):
    before = {path.name: path.read_bytes() for path in release.iterdir()}
    monkeypatch.setattr(store, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.save(release, model, {"queries.vectors": torch.zeros(4, 32)})
    assert {path.name: path.read_bytes() for path in release.iterdir()} == before
    assert os.listdir(release.parent) == ["release"]


def test_others_may_read_it_as_the_umask_says(model, tmp_path):
    old = os.umask(0o027)
    try:
        store.save(tmp_path / "release", model)
    finally:
        os.umask(old)
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "release").iterdir()] == ["0o640"] * 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(format="other"), "format is not"),
        (lambda raw: raw.update(version=99), "version 99"),
        (lambda raw: raw.update(extra=1), "unknown key extra"),
        (lambda raw: raw["model"]["connector"].update(layer=2), "unknown key connector.layer"),
        (lambda raw: raw["model"].update(queries="many"), "queries"),
        (lambda raw: raw["model"]["connector"].update(layers=2), "lacks"),
        (lambda raw: raw["model"]["connector"].update(layers=0), "unknown tensors"),
        (lambda raw: raw["model"].update(queries=5), "of shape"),
        (lambda raw: raw["frozen"]["mllm"].update(sha256="0"), "the mllm at .* is not the one"),
        (lambda raw: raw.update(frozen=[]), "frozen is no JSON object"),
        (lambda raw: raw["model"]["vae"].update(path="gone"), "vae.path 'gone'"),
    ],
)
def test_what_does_not_fit_is_refused(release, edit, message):
    change(release, edit)
    with pytest.raises(ValueError, match=message):
        store.load(release)


def test_missing_and_damaged_tensors_are_refused(release):
    path = release / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "queries.vectors"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first queries.vectors"):
        store.load(release)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        store.load(release)
    (release / "config.json").unlink()
    with pytest.raises(ValueError, match="is no release"):
        store.load(release)


def test_paths_inside_the_repository_travel_with_it(tmp_path):
    assert portable(str(ROOT / "model")) == portable("model") == "model"
    assert locate("model") is not None
    assert portable(str(tmp_path)) == str(tmp_path)
    assert portable("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
