"""REPA-E: who gets which gradient, and that three engines take the steps of three plain optimizers."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image

from data.batch import LabelledBatch, LabelledCollate
from data.loader import World
from data.records import Labelled
from data.told import ClassesTold, ScenesTold
from model import metaquery
from model.decoder import SiTDecoderConfig
from model.discriminator import Discriminator, DiscriminatorConfig
from model.files import read_tensors
from model.perceptual import FeatureDistance
from model.sit import SiT
from model.upsample import UpsampledConv
from model.vae import VAEConfig
from sample.decoder_scores import score
from sample.labelled import load_decoder
from tests import tiny
from tests.tiny_repae import BATCH, CLIP_NORM, LOSSES, STEPS, advance, build, in_plain_torch, repae_run, weights
from tests.toy import save
from tests.two_ranks import REPAE, results
from train import checkpoint
from train.engine import EngineConfig
from train.ranks import start
from train.repae import RepaeTaskConfig, VAELosses, _injected
from train.run import named, names

FP32 = EngineConfig(zero=1, precision="fp32", clip_norm=CLIP_NORM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("repae")


def test_an_injected_gradient_has_no_value_and_is_that_of_its_judge():
    made = torch.randn(3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    term = _injected(made, lambda x: (weight * x.square()).sum(), nullcontext())
    assert term.item() == 0
    term.backward()
    assert made.grad is not None
    assert torch.equal(made.grad, 2 * made.detach())
    assert weight.grad is None


def assert_alike(seen, expected):
    """To a millionth; the average of the statistics is ours alone. (AdamW's eps is large here: where a gradient is rounding
    and nothing else, as that of a bias before a norm, it would be scaled up to a whole step.)"""
    for name, tensor in seen.items():
        if not name.endswith("norm.average"):
            torch.testing.assert_close(
                tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
            )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_three_plain_optimizers(folder, accumulation):
    run = repae_run(folder, FP32, accumulation)
    expected, trained = in_plain_torch(run)
    task = build(run, start(60))
    before = weights(task)
    seen = advance(task, run)
    for ours, theirs in zip(seen, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
    assert min(norms["vae.norm"] for norms in expected) > CLIP_NORM  # clipping is at work
    after = weights(task)
    assert_alike(after, trained)
    still = [name for name in before if torch.equal(before[name], after[name])]  # their gradients are zero
    assert all(name.endswith(("to_k.bias", "discriminator.net.5.bias")) for name in still), still


@pytest.mark.parametrize("name", REPAE)
def test_two_ranks_take_them_too(folder, name):
    zero, accumulation = (int(part) for part in name.split("-")[1:3])
    out, first, second = results()
    assert first[name]["digest"] == second[name]["digest"]
    _, trained = in_plain_torch(repae_run(out, replace(FP32, zero=zero), accumulation))
    assert_alike(torch.load(out / f"{name}.pt"), trained)


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_half_precision_stays_close(folder, precision):
    """The losses of three steps within 2 % of those in float32."""
    run = repae_run(folder, replace(FP32, precision=precision))
    expected, _ = in_plain_torch(run)
    for ours, theirs in zip(advance(build(run, start(60)), run), expected, strict=True):
        for name in ("loss", "l1", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2)


ALONE = VAELosses(l1=0, l2=0, perceptual=0, kl=0, adversarial=0, align=0)
NO_JUDGES: dict[str, Any] = dict(perceptual=None, discriminator=None)


def vae_gradients(folder, losses):
    """What one backward pass of the VAE's engine leaves: its gradients by name, those of the others, and the task."""
    task: Any = build(repae_run(folder, replace(FP32, zero=0), losses=losses, **NO_JUDGES), start(60))
    task.engines["vae"].step = lambda: None
    task._step_sit = lambda *_: {}
    task.step(next(task.batches(0)))
    others = [p.grad for p in task.sit.parameters()]
    gradients: dict[str, Any] = {name: p.grad for name, p in task.coder.named_parameters()}
    return gradients, others, task


def reached(gradients):
    """The halves of the VAE that got a gradient."""
    return {name.split(".")[1] for name, gradient in gradients.items() if gradient is not None and gradient.any()}


def test_the_diffusion_loss_gives_the_vae_nothing(folder):
    """With every other loss off, exactly zero comes back, whatever the SiT learns from the latents."""
    task = build(repae_run(folder, replace(FP32, zero=0), losses=ALONE, **NO_JUDGES), start(60))
    task.engines["vae"].step = lambda: None
    task.step(next(task.batches(0)))
    assert task.engines["main"].steps == 1
    assert reached({name: p.grad for name, p in task.coder.named_parameters()}) == set()


def test_the_naive_control_gives_it_something(folder):
    gradients, _, _ = vae_gradients(folder, replace(ALONE, diffusion=1.0))
    assert reached(gradients) == {"encoder", "quant_conv"}
    assert gradients["autoencoder.encoder.conv_in.weight"].abs().max() > 1e-6


def test_the_alignment_of_the_vae_reaches_its_encoder_alone(folder):
    """Not the SiT, its projector or the VAE's own decoder; and the statistics stay."""
    gradients, others, task = vae_gradients(folder, replace(ALONE, align=1.5))
    assert reached(gradients) == {"encoder", "quant_conv"}
    assert gradients["autoencoder.encoder.conv_in.weight"].abs().max() > 1e-6
    assert all(gradient is None for gradient in others)
    fresh = build(repae_run(folder, replace(FP32, zero=0), **NO_JUDGES, losses=ALONE), start(60))
    for name, buffer in task.sit.named_buffers():
        assert torch.equal(buffer, fresh.sit.get_buffer(name)), name


def test_the_discriminator_learns_from_its_own_loss_alone(folder):
    """The VAE's wish to deceive it leaves nothing with it."""
    task: Any = build(repae_run(folder, replace(FP32, zero=0)), start(60))
    task._step_discriminator = lambda *_: {}
    task.step(next(task.batches(0)))
    assert all(p.grad is None for p in task.engines["discriminator"].module.parameters())


def test_both_passes_through_the_sit_have_one_time_and_one_noise(folder):
    task = build(repae_run(folder, FP32), start(60))
    calls = []
    task.sit.register_forward_pre_hook(lambda module, given: calls.append(given))
    task.step(next(task.batches(0)))
    (_, aside, t1, eps1, update1), (_, trained, t2, eps2, update2) = (call[:5] for call in calls)
    assert torch.equal(t1, t2)
    assert torch.equal(eps1, eps2)
    assert torch.equal(aside, trained)
    assert (update1, update2) == (False, True)
    assert "position" not in dict(task.sit.sit.named_parameters())  # a buffer, which no step moves


def test_no_class_is_dropped_where_the_vae_learns(folder):
    task = build(repae_run(folder, FP32, told=ClassesTold(classes=3, dropout=1.0)), start(60))
    told, asking = [], []

    def note(module, given):
        told.append(given[0][0])
        asking.append(any(p.requires_grad for p in module.parameters()))

    task.sit.register_forward_pre_hook(note)
    task.step(replace(next(task.batches(0)), labels=torch.arange(BATCH) % 3))
    aside, trained = told
    assert bool((aside > 0).all())
    assert not trained.any()
    assert asking == [False, True]


def test_the_release_is_a_decoder_and_scores_as_one(folder, tmp_path):
    """The VAE is diffusers' own, its statistics in its config; SiT and VAE draw in a MetaQuery; labels tell them what."""
    run = repae_run(folder, FP32)
    task = build(run, start(60))
    advance(task, run)
    task.preview(tmp_path, 3)
    assert Image.open(tmp_path / "step-00000003.png").width > 3 * 16
    task.release(tmp_path / "release")
    with task.engines["vae"].averaged():
        expected = {name: tensor.clone() for name, tensor in task.coder.autoencoder.state_dict().items()}
    vae = AutoencoderKL.from_pretrained(tmp_path / "release" / "vae")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
    mean, std = task.sit.norm.statistics()
    assert (vae.config["latents_mean"], vae.config["latents_std"]) == (pytest.approx(mean), pytest.approx(std))
    decoder = load_decoder(tmp_path / "release")
    told = ScenesTold().whole(next(task.batches(0)), 0)
    drawn = decoder.draw(told, range(BATCH), steps=2)
    assert drawn.shape == (BATCH, 3, 16, 16)
    data = replace(run.data, sources=(World(split="val"),))
    measures = score(decoder, task.targets[0], ScenesTold(), data, n=6, seed=0, batch_size=4, steps=2)
    assert all(measure.n == 6 for measure in measures.values())
    bridge = tiny.metaquery_config(
        folder,
        vae=VAEConfig(str(tmp_path / "release" / "vae")),
        decoder=SiTDecoderConfig(path=str(tmp_path / "release" / "sit")),
    )
    assert metaquery.build(bridge).latent_shape == decoder.latent_shape


def test_classes_condition_and_flips_are_addressed(folder):
    """Class numbers in place of scenes; a mirrored picture is the same one whatever its batch."""
    told = ClassesTold(classes=3, dropout=0.5)
    labels = torch.arange(400) % 3
    batch = LabelledBatch(torch.arange(400), labels, torch.zeros(400, 3, 2, 2))
    words, _ = told(batch, 0, 8)
    kept = words.flatten() > 0
    assert torch.equal(words.flatten()[kept], (labels + 1)[kept])
    assert 0.4 < kept.float().mean() < 0.6
    part = LabelledBatch(batch.index[7:9], labels[7:9], batch.pixels[7:9])
    assert torch.equal(told(part, 0, 8)[0], words[7:9])
    with pytest.raises(ValueError, match=r"a label is 2 and task.told.classes is 2; raise it"):
        ClassesTold(classes=2).whole(batch, 0)
    pictures = [Labelled("", tiny.image((16, 16), seed), 0) for seed in range(20)]
    flipped = LabelledCollate(16, flip=True, seed=1)(pictures, range(20)).pixels
    plain = LabelledCollate(16)(pictures, range(20)).pixels
    mirrored = [not torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert 4 < sum(mirrored) < 16
    assert torch.equal(flipped, torch.where(torch.tensor(mirrored).view(-1, 1, 1, 1), plain.flip(-1), plain))
    assert torch.equal(LabelledCollate(16, flip=True, seed=1)(pictures[5:6], [5]).pixels[0], flipped[5])


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_published_sizes(size, millions):
    """SiT's own counts (Ma et al. 2024, table 1), which round to a million; of the classes' vectors it counts 1,001."""
    task = named(f"repae.{size}_f8d4")().task
    assert isinstance(task, RepaeTaskConfig)
    assert task.sit is not None
    with torch.device("meta"):
        sit = SiT(task.sit)
        out = sit(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, 1, task.sit.condition_width))
    own = sum(p.numel() for p in sit.parameters()) + 1001 * task.sit.width
    assert own == pytest.approx(millions * 1e6, abs=0.6e6)
    assert out.prediction.shape == (1, 4, 32, 32)


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("repae.")])
def test_every_run_is_consistent(name):
    """Builds the parts that need no weights; the published ones at full size."""
    task = named(name)().task
    assert isinstance(task, RepaeTaskConfig)
    with torch.device("meta"):
        if task.sit is not None:
            assert SiT(task.sit).config.align_depth or not task.targets
        if task.discriminator is not None:
            Discriminator(task.discriminator)


def test_resumed_equals_straight_bit_for_bit(folder, tmp_path):
    run, ranks = repae_run(folder, replace(FP32, precision="autocast")), start(60)
    straight = build(run, ranks)
    advance(straight, run, 0, 2)
    path = save(straight, tmp_path, 2)
    advance(straight, run, 2, STEPS)
    resumed = build(run, ranks)
    checkpoint.load(path, resumed.engines, ranks)
    advance(resumed, run, 2, STEPS)
    expected, found = weights(straight), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_vae_stays_after_its_step_and_the_sit_goes_on(folder):
    run = repae_run(folder, FP32, freeze_vae_after=1)
    task = build(run, start(60))
    advance(task, run, 0, 1)
    before = weights(task)
    measured = advance(task, run, 1, 2)[-1]
    after = weights(task)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"main"}
    assert "l1" not in measured
    task.release(folder / "stayed")
    released = read_tensors(folder / "stayed" / "vae" / "diffusion_pytorch_model.safetensors")
    for name, tensor in released.items():  # not the average, which lags behind
        assert torch.equal(tensor, after[f"vae.autoencoder.{name}"]), name


def test_alignment_ends_when_told(folder):
    run = repae_run(folder, FP32, align_until=1)
    seen = advance(build(run, start(60)), run)
    assert ["align" in scalars for scalars in seen] == [True, False, False]


def test_some_of_a_batch_is_rebuilt(folder):
    task = build(repae_run(folder, FP32, recon_fraction=0.5), start(60))
    sizes = []
    task.coder.register_forward_hook(lambda module, given, out: sizes.append((len(out.latents), len(out.rebuilt))))
    task.step(next(task.batches(0)))
    assert sizes == [(BATCH, BATCH // 2)]


def test_features_that_the_alignment_needs_are_looked_for_once(folder, monkeypatch):
    """The distance by the same encoder on the same grid takes those of the pictures over, and is what it was."""
    run = repae_run(folder, FP32, recon_fraction=0.5)
    task = build(run, start(60))
    batch = next(task.batches(0))
    assert isinstance(task.distance, FeatureDistance)
    assert task.distance.target is task.targets[0]
    calls = []
    task.targets[0].encoder.register_forward_hook(lambda module, given, out: calls.append(len(out.last_hidden_state)))
    measured = task.step(batch)
    assert calls == [BATCH, BATCH // 2]  # the pictures, and what was rebuilt
    calls.clear()
    monkeypatch.setattr("train.repae.FeatureDistance", type(None))  # then every distance is a stranger
    apart = build(run, start(60))
    apart.targets[0].encoder.register_forward_hook(lambda module, given, out: calls.append(len(out.last_hidden_state)))
    torch.testing.assert_close(apart.step(batch)["perceptual"], measured["perceptual"])
    assert sorted(calls) == [BATCH // 2, BATCH // 2, BATCH]  # the pictures twice
    assert any(isinstance(module, UpsampledConv) for module in task.coder.modules())


def test_a_sit_goes_on_from_an_earlier_one(folder, tmp_path):
    run = repae_run(folder, FP32)
    first = build(run, start(60))
    first.release(tmp_path / "release")
    second = build(repae_run(folder, FP32, init=tmp_path / "release" / "sit"), start(60))
    for part in ("sit", "teller"):
        ours, theirs = (getattr(task.sit, part).state_dict() for task in (second, first))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with pytest.raises(ValueError, match="has no labels"):
        build(repae_run(folder, FP32, init=folder), start(60))


def test_pictures_need_not_be_square(folder):
    task = build(repae_run(folder, FP32), start(60))
    batch = next(task.batches(0))
    wide = replace(batch, levels=torch.cat([batch.levels, batch.levels[..., :8]], dim=-1))  # 16 x 24
    before = weights(task)
    measured = task.step(wide)
    assert {"loss", "align", "l1", "perceptual"} <= measured.keys()
    assert {name.split(".")[0] for name, tensor in weights(task).items() if not torch.equal(tensor, before[name])} == {
        "main",
        "vae",
        "discriminator",
    }


def test_a_frozen_vae_is_only_read(folder):
    run = repae_run(folder, FP32, train_vae=False)
    task = build(run, start(60))
    assert task.engines.keys() == {"main"}
    before = {name: tensor.clone() for name, tensor in task.coder.state_dict().items()}
    advance(task, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.coder.state_dict().items())
    assert task.frozen().keys() == {"target 0", "vae"}
    assert build(repae_run(folder, FP32), start(60)).frozen().keys() == {"target 0", "perceptual"}
    mean, std = task.sit.norm.statistics()
    assert (mean, std) == (pytest.approx([0.1, -0.2, 0.0, 0.3]), pytest.approx([0.5, 1.0, 2.0, 0.8]))


def test_a_refused_step_leaves_no_trace(folder):
    """One batch with a broken picture: the statistics and the weights stay, and the next batch is learned from."""
    run = repae_run(folder, FP32)
    task = build(run, start(60))
    batch = next(task.batches(0))
    before = weights(task)
    task.step(replace(batch, levels=batch.pixels.clone().fill_(float("nan"))))
    assert all(engine.last and engine.last.objection for engine in task.engines.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(task).items())
    task.step(batch)
    assert not any(engine.last and engine.last.objection for engine in task.engines.values())


def test_the_guard_sees_no_spike_in_an_objective_near_zero(folder):
    """The alignment is counted from 0 up, and a discriminator that has won is not watched for spikes."""
    task: Any = build(repae_run(folder, FP32), start(60))
    seen = {}
    for name, engine in task.engines.items():
        backward = engine.backward
        engine.backward = lambda loss, name=name, backward=backward: (seen.setdefault(name, float(loss)), backward(loss))
    task.step(next(task.batches(0)))
    assert min(seen.values()) >= 0
    assert task.engines["discriminator"].config.guard.spike == 0


def test_parts_that_do_not_fit_are_refused(folder):
    for changes, message in [
        (dict(sit=tiny.sit_config(latent_channels=3)), r"draws latents of 3 x 8 x 8, and task.vae .* makes 4 x 8 x 8"),
        (dict(sit=tiny.sit_config(latent_size=16)), r"draws latents of 4 x 16 x 16"),
        (dict(discriminator=DiscriminatorConfig(norm="sync")), "norm sync needs GPUs"),
        (dict(told=ScenesTold(spare=59)), "task.told.spare makes 65 conditioning tokens and the SiT takes 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(repae_run(folder, FP32, **changes), start(60))


def test_an_autoencoder_without_posterior_trains_without_kl(folder, tmp_path):
    """DC-AE encodes to a point; asked to hold back a posterior it says that it has none."""
    settings: dict[str, Any] = dict(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
    )
    AutoencoderDC(**settings).save_pretrained(tmp_path)
    changes: dict[str, Any] = dict(vae=VAEConfig(str(tmp_path)))
    with pytest.raises(ValueError, match=r"task.losses.kl: task.vae .* has no posterior"):
        build(repae_run(folder, FP32, **changes), start(60))
    run = repae_run(folder, FP32, **changes, losses=replace(LOSSES, kl=0.0))
    seen = advance(build(run, start(60)), run)
    assert all("kl" not in scalars and scalars["vae.norm"] > 0 for scalars in seen)


def test_settings_that_contradict_each_other_are_refused(folder):
    for changes, message in [
        (dict(perceptual=None), "task.losses.perceptual needs a network"),
        (dict(discriminator=None), "task.losses.adversarial needs task.discriminator"),
        (dict(sit=tiny.sit_config(align_depth=0)), "task.targets need a block"),
        (dict(sit=None, targets=(), train_vae=False), "nothing is left to train"),
        (dict(train_vae=False, fresh_vae=True), "task.fresh_vae gives weights that nothing would train"),
        (dict(recon_fraction=0.0), "give a share above 0"),
        (dict(freeze_vae_after=-1), "freeze_vae_after is -1; give a step, or 0 for none"),
        (dict(flip=True), "task.flip would contradict the places"),
    ]:
        with pytest.raises(ValueError, match=message):
            repae_run(folder, FP32, **changes)
