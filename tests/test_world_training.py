"""The tasks that make the world's own parts: each trains, releases what the next one loads, and resumes."""

import itertools
import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

from configs import world
from data.loader import Data, World
from data.world.asks import Mix
from data.world.labels import GROUNDS, KINDS_OF_WORDS, nothing
from data.world.wanted import LOOSE
from model import store
from model.connector import ConnectorConfig
from model.decoder import SiTDecoderConfig, load_sit
from model.files import dump_config, parse_config, read_json, read_tensors, write_tensors
from model.labels import load_labels
from model.mllm import MLLMConfig, load
from model.prefix import Prefix
from model.qwen import Qwen2_5_VL
from model.vae import VAEConfig, load_vae
from train import run as entry
from train.autoencoder import AutoencoderTaskConfig
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.labelled import LabelledTaskConfig
from train.loop import Schedule
from train.metaquery import MetaQueryTaskConfig
from train.optim import OptimConfig
from train.ranks import start
from train.see import SeeTaskConfig
from train.tell import TellTaskConfig, reading_of

SHORT = Schedule(steps=3, batch_size=4, log_every=1, save_every=2)
FP32 = EngineConfig(zero=1, precision="fp32")


def train(run: Run) -> None:
    assert entry.train(run, start(run.engine.timeout_seconds)) == 0


def ends_alike(run: Run) -> None:
    """From its middle checkpoint on, a run that has ended ends again on the same bytes."""
    middle = run.folder / "checkpoints" / "step-00000002"
    again = replace(run, out=run.folder.with_name(f"{run.name}-again"), resume=str(middle))
    train(again)
    last = [read_json(r.folder / "checkpoints" / "step-00000003" / "manifest.json") for r in (run, again)]
    assert last[0]["sha256"] == last[1]["sha256"]
    assert last[0]["counters"] == last[1]["counters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VAE of the world, trained for three steps."""
    folder = tmp_path_factory.mktemp("parts")
    task = AutoencoderTaskConfig(channels=(8, 8), latent_channels=4, layers_per_block=1, groups=4, attention=False)
    data = Data(sources=(World(),), task="labelled", image_size=16)
    run = Run("vae", task, data, SHORT, engine=FP32, out=folder / "vae")
    train(run)
    ends_alike(run)
    return folder


def test_the_vae_loads_in_diffusers_and_gives_latents_of_unit_variance(folder):
    release = folder / "vae" / "release"
    stock: Any = AutoencoderKL.from_pretrained(release)
    assert len(stock.config.latents_mean) == 4
    pixels = next(tiny_batches(folder)).pixels
    latents = load_vae(VAEConfig(str(release))).encode(pixels)
    assert 0.5 < latents.std() < 2


def test_a_decoder_goes_on_and_leaves_the_encoder_and_its_statistics_bit_for_bit(folder):
    run = Run(
        "decode",
        AutoencoderTaskConfig(
            channels=(8, 8),
            latent_channels=4,
            layers_per_block=1,
            groups=4,
            attention=False,
            init=str(folder / "vae" / "release"),
            decoder_only=True,
        ),
        Data(sources=(World(seed=3),), task="labelled", image_size=16),
        SHORT,
        engine=EngineConfig(zero=1, precision="bf16"),  # rounds what it holds
        out=folder / "decode",
    )
    train(run)
    before, after = (load_vae(VAEConfig(str(folder / name / "release"))).autoencoder for name in ("vae", "decode"))
    changed = {name.split(".")[0] for name, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert before.config.latents_mean == after.config.latents_mean


def test_a_decoder_alone_needs_an_encoder_to_keep():
    with pytest.raises(ValueError, match=r"task\.init"):
        AutoencoderTaskConfig(decoder_only=True)
    run = world.vae()
    with pytest.raises(ValueError, match=r"data\.image_size is 66; give a multiple of 4"):
        run.task.build(replace(run, data=replace(run.data, image_size=66)), start(60))


def test_a_labelled_sit_trains_goes_on_and_is_loaded_as_a_decoder(folder):
    task = LabelledTaskConfig(sit=tiny.sit_config(), vae=VAEConfig(str(folder / "vae" / "release")))
    data = Data(sources=(World(),), task="labelled", image_size=16)
    run = Run("sit", task, data, SHORT, engine=FP32, out=folder / "sit")
    train(run)
    ends_alike(run)
    release = folder / "sit" / "release"
    assert load_sit(str(release)).config == task.sit
    assert (folder / "sit" / "previews" / "step-00000003.png").is_file()
    train(replace(run, task=replace(task, init=release), out=folder / "on"))  # a new run on the old weights
    train(replace(run, task=replace(task, align=0.0), out=folder / "unaligned"))
    assert [("shape_accuracy" in (folder / name / "metrics.jsonl").read_text()) for name in ("sit", "unaligned")] == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match=r"data\.image_size is 32; .* 4 x 8 x 8, .* of 2 x 2 pixels each; make them fit"):
        train(replace(run, data=replace(data, image_size=32), out=folder / "large"))
    other = folder / "other-vae"
    shutil.copytree(folder / "vae" / "release", other)
    path = other / "diffusion_pytorch_model.safetensors"
    write_tensors(path, {name: tensor * 2 for name, tensor in read_tensors(path).items()})
    with pytest.raises(ValueError, match=r"the vae is not the one that .* was trained with"):
        train(replace(run, task=replace(task, vae=VAEConfig(str(other)))))
    (release / "labels.safetensors").unlink()
    with pytest.raises(ValueError, match="labels"):
        train(replace(run, task=replace(task, init=release), out=folder / "off"))


def test_a_bridge_learns_from_what_its_decoder_knows_of_each_point(folder):
    """A step with the alignment moves the bridge where a step without it does not, and is refused where it cannot be."""
    model = tiny.metaquery_config(folder / "bridge", decoder=SiTDecoderConfig(path=str(folder / "sit" / "release")))
    run = Run(
        "on",
        MetaQueryTaskConfig(model, align=0.5),
        Data(sources=(World(),), image_size=16),
        SHORT,
        engine=EngineConfig(zero=1),
    )
    for name, align in (("aligned", 0.5), ("plain", 0.0)):
        train(replace(run, task=replace(run.task, align=align), out=folder / name))
    first = {
        name: json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("aligned", "plain")
    }
    assert first["aligned"]["loss"] == first["plain"]["loss"]
    assert first["aligned"]["grad_norm"] != first["plain"]["grad_norm"]
    assert 0 <= first["aligned"]["shape_accuracy"] <= 1
    store.load(folder / "aligned" / "release")  # its decoder is still the one it names
    with pytest.raises(ValueError, match="scenes"):
        run.task.build(replace(run, data=replace(run.data, task="edit")), start(60))
    (folder / "sit" / "release" / "align.safetensors").unlink()
    with pytest.raises(ValueError, match=r"align\.safetensors"):
        run.task.build(run, start(60))


def test_a_bridge_learns_its_decoder_s_language_and_goes_on_to_draw(folder):
    """The loss is that of the release's own conditioning; a run that also trains parts of the decoder starts from it."""
    labelled = LabelledTaskConfig(sit=tiny.sit_config(), vae=VAEConfig(str(folder / "vae" / "release")))
    data = Data(sources=(World(),), task="labelled", image_size=16)
    train(Run("sit", labelled, data, SHORT, engine=FP32, out=folder / "teller"))
    decoder = SiTDecoderConfig(path=str(folder / "teller" / "release"))
    model = tiny.metaquery_config(folder / "told", decoder=decoder, trainable=("*",))
    with pytest.raises(ValueError, match=r"queries"):
        TellTaskConfig(replace(model, queries=5)).build(Run("few", TellTaskConfig(model)), start(60))
    model = replace(model, queries=8)
    run = Run(
        "tell",
        TellTaskConfig(model, mix=Mix(caption=1.0, edit=0.0, reconstruct=0.0, subject=0.0)),
        Data(sources=(World(),), image_size=16),
        SHORT,
        OptimConfig(lr=3e-3, warmup_steps=0),
        engine=FP32,
        out=folder / "tell",
    )
    assert parse_config(Run, dump_config(run), folder / "run.json") == run  # not taken for a task that draws
    train(run)
    ends_alike(run)
    train(replace(run, schedule=replace(SHORT, steps=12), ema=EmaConfig(halflife_images=1)))
    logged = [json.loads(line) for line in (folder / "tell" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert losses[-1] < losses[0]

    release, ranks = store.load(folder / "tell" / "release"), start(60)
    task = TellTaskConfig(model, init=folder / "tell" / "release").build(run, ranks)
    batch = next(task.batches(12 * 4))
    words = ["none" if word == 1 else "" for word in batch.words[:, 1:, 0].flatten().tolist()]
    assert "none" in words
    assert isinstance(batch.asked, Prefix)
    with torch.no_grad():
        given, told = release.condition(batch.asked)[:, :6], task.labels(batch.words, batch.places)
        ways = task.labels(batch.open_words, batch.open_places)
    nearest = []
    for row, label, open_row, told_ways in zip(given, told, batch.open_row.tolist(), ways, strict=True):
        labels = [label.index_copy(0, torch.tensor([open_row]), way[None]) for way in told_ways.unique(dim=0)]
        orders = [[0, *order] for order in itertools.permutations(range(1, 6))]
        nearest.append(min((row - right[order]).square().mean() for right in labels for order in orders))
    torch.testing.assert_close(task.step(batch)["loss"], torch.stack(nearest).mean())

    drawing = MetaQueryTaskConfig(model, init=folder / "tell" / "release")
    wider = replace(drawing, model=replace(model, queries=model.queries + 1))
    with pytest.raises(ValueError, match=r"has .*; task\.init: \S+ is of a model of another shape"):
        wider.build(replace(run, task=wider), ranks)
    train(replace(run, name="drawn", task=drawing, out=folder / "drawn"))
    drawn = store.load(folder / "drawn" / "release").own_tensors()
    train(replace(run, name="on", task=replace(run.task, init=folder / "drawn" / "release"), out=folder / "told on"))
    on, told = store.load(folder / "told on" / "release").own_tensors(), release.own_tensors()
    assert on.keys() == drawn.keys() == told.keys()
    decoder = [name for name in on if name.startswith("decoder.")]
    assert all(torch.equal(on[name], drawn[name]) for name in decoder)  # only what is told has changed since
    assert not all(torch.equal(on[name], told[name]) for name in decoder)
    assert not all(torch.equal(on[name], drawn[name]) for name in on.keys() - decoder)


@pytest.fixture(scope="module")
def pooled(folder):
    """A run that learns from pools of two batches, with a connector that looks."""
    labelled = LabelledTaskConfig(sit=tiny.sit_config(), vae=VAEConfig(str(folder / "vae" / "release")))
    data = Data(sources=(World(),), task="labelled", image_size=16)
    train(Run("sit", labelled, data, SHORT, engine=FP32, out=folder / "pool teller"))
    decoder = SiTDecoderConfig(path=str(folder / "pool teller" / "release"))
    connector = ConnectorConfig(layers=1, looks=True)
    model = tiny.metaquery_config(folder / "pooled", decoder=decoder, queries=8, connector=connector)
    data = Data(sources=(World(),), image_size=16)
    optim, out = OptimConfig(lr=3e-3, warmup_steps=0), folder / "pool"
    return Run("pool", TellTaskConfig(model, pool=8), data, SHORT, optim, engine=FP32, out=out)


def test_a_pool_is_read_once_and_told_again(pooled):
    """Two passes over a pool of two batches: each batch as it would be read anew, by a model that reads twice."""
    ranks = start(60)
    task = pooled.task.build(pooled, ranks)
    before = task.model.mllm.prefills
    batches = list(itertools.islice(task.batches(0), 4))
    assert task.model.mllm.prefills == before + 2
    assert batches[2] is batches[0]
    anew = next(replace(pooled.task, pool=0).build(pooled, ranks).batches(0))
    torch.testing.assert_close(task.engine(batches[0].asked), task.engine(anew.asked))
    assert task.model.queries is not None
    assert not task.model.queries.vectors.requires_grad
    captions = replace(pooled.task, mix=Mix(caption=1.0, edit=0.0, reconstruct=0.0, subject=0.0), layout=True, pool=0)
    spoken = replace(captions, layout=False).build(pooled, ranks).batches(0)
    loose: set[int] = set()  # how many things have a place
    for laid, plain in itertools.islice(zip(captions.build(pooled, ranks).batches(0), spoken, strict=True), 6):
        loose |= {int((row == np.float32(LOOSE)).sum()) for row in laid.places[:, 1:, 2].numpy()}
        assert torch.equal(laid.words, plain.words)
        assert not (plain.places[..., 2] == LOOSE).any()
    assert 0 in loose
    assert {2, 3, 4} & loose
    assert 1 not in loose
    started = replace(pooled.task, init=pooled.folder / "release")
    store.save(pooled.folder / "release", task.model)
    frozen = started.build(pooled, ranks).frozen()
    assert started.build(pooled, ranks).frozen() == frozen
    with torch.no_grad():
        task.model.queries.vectors += 1
    store.save(pooled.folder / "release", task.model)
    other = started.build(pooled, ranks).frozen()
    assert [name for name in frozen if other[name] != frozen[name]] == ["start (task.init)"]
    unlearned = replace(pooled.task, pool=0, model=replace(pooled.task.model, learned_queries=False))
    queries = unlearned.build(pooled, ranks).model.queries
    assert queries is not None
    assert not queries.vectors.requires_grad
    with pytest.raises(ValueError, match=r"task\.pool is 7"):
        replace(pooled.task, pool=7).build(pooled, ranks)
    with pytest.raises(ValueError, match=r"task\.passes is 2"):
        replace(pooled.task, pool=0, passes=2).build(pooled, ranks)


def test_a_pool_that_is_worn_out_makes_way_for_the_next_wherever_a_run_goes_on(pooled):
    """Two passes over each pool; a run that goes on within one reads what it missed, and then the same."""
    task = replace(pooled.task, passes=2).build(pooled, start(60))
    anew = list(itertools.islice(task.asks, 4))  # two pools
    batches = list(itertools.islice(task.batches(0), 8))
    for batch, place in zip(batches, (0, 1, 0, 1, 2, 3, 2, 3), strict=True):
        assert torch.equal(batch.words, anew[place].words)
    before = task.model.mllm.prefills
    for begun in (1, 2, 3, 5):
        on = list(itertools.islice(task.batches(begun * 4), 8 - begun))
        assert all(torch.equal(a.asked.states, b.asked.states) for a, b in zip(on, batches[begun:], strict=True))
    assert task.model.mllm.prefills - before == 4 + 4 + 3 + 2


def test_rows_of_like_length_are_told_apart_and_no_row_can_tell(pooled, monkeypatch):
    task = pooled.task.build(pooled, start(60))
    asked = next(task.batches(0)).asked
    assert len(set((asked.looked.ages != 0).sum(1).tolist())) > 1
    together = task.engine(asked)
    monkeypatch.setattr("model.metaquery.GROUP_TOKENS", 0)  # each length by itself
    torch.testing.assert_close(task.engine(asked), together)


def test_a_reading_of_label_tokens_says_how_far_off_a_place_is():
    """Four times the square of the way for the place, half for a wrong word, whatever else a token says."""
    labels = load_labels("assets/world/sit")
    reading = reading_of(labels)
    words = torch.tensor([[kind[0] for kind in KINDS_OF_WORDS]]).repeat(2, 1)
    words[1, 0] = KINDS_OF_WORDS[0][3]
    for way in (0.1, 0.4):
        places = torch.tensor([[0.3, 0.5, 0.0], [0.3 + way, 0.5, 0.0]])
        moved, recoloured = (
            labels(words[:1].expand(2, -1)[None], places[None])[0],
            labels(words[None], places[:1].expand(2, -1)[None])[0],
        )
        assert ((moved[1] - moved[0]) @ reading).square().sum().item() == pytest.approx(4 * way**2, rel=0.6)
        assert ((recoloured[1] - recoloured[0]) @ reading).square().sum().item() == pytest.approx(0.5, rel=0.6)
    words, places = (torch.from_numpy(part[:1]).repeat(4, 1) for part in nothing())
    words[:, 0] = torch.tensor(GROUNDS)
    grounds = labels(words[None], places[None])[0] @ reading
    assert torch.pdist(grounds).square().tolist() == pytest.approx([0.5] * 6, rel=0.6)


def test_a_vision_tower_learns_dense_labels_and_leaves_the_language_model_alone(folder):
    source = tiny.mllm_folder(folder / "mllm")
    data = Data(sources=(World(),), task="labelled", image_size=16)
    run = Run("see", SeeTaskConfig(init=source, points=2), data, SHORT, engine=FP32, out=folder / "see")
    train(run)
    ends_alike(run)
    before, after = (weights(path) for path in (source, folder / "see" / "release"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("visual" in name for name in changed)


@pytest.mark.parametrize("run", [world.vae(), world.decoder()], ids=lambda run: run.name)
def test_the_wrong_data_is_refused(run):
    with pytest.raises(ValueError, match=r"data\.task"):
        run.task.build(replace(run, data=replace(run.data, task="t2i")), start(60))


def weights(folder):
    mllm = load(MLLMConfig(str(folder), dtype="bfloat16"))
    assert isinstance(mllm, Qwen2_5_VL)
    return mllm.model.state_dict()


def tiny_batches(folder):
    from data.batch import LabelledCollate
    from data.loader import Loader

    assert read_json(folder / "vae" / "run.json")["data"]["image_size"] == 16
    return iter(Loader(Data(sources=(World(),), task="labelled", image_size=16), LabelledCollate(16), 32))
