import argparse
import math
import stat
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from model.files import read_json, read_tensors
from sample.classes import main as draw_classes
from sample.convert import main
from sample.labelled import load_decoder

WIDTH, DEPTH, HEADS, CLASSES, PATCH, CHANNELS, SIDE = 384, 12, 6, 5, 2, 4, 8  # SiT-S on latents of 8 x 8


def official_sit(seed=0):
    """What the official SiT's state dict holds, by its names, random."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "pos_embed": (1, (SIDE // PATCH) ** 2, WIDTH),
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (PATCH * PATCH * CHANNELS, WIDTH),
        "final_layer.linear.bias": (PATCH * PATCH * CHANNELS,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
        "projectors.0.0.weight": (8, WIDTH),
        "bn.running_mean": (CHANNELS,),
        "bn.running_var": (CHANNELS,),
    }
    for block in range(DEPTH):
        for name, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
            ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):
            shapes |= {f"blocks.{block}.{name}.weight": (out, into), f"blocks.{block}.{name}.bias": (out,)}
    tensors = {name: torch.randn(shape, generator=random) * 0.04 for name, shape in shapes.items()}
    tensors["bn.running_var"] = tensors["bn.running_var"].abs() + 1
    return tensors | {"bn.num_batches_tracked": torch.tensor(7)}


def official_velocity(w, x, t, label):
    """The published network (Peebles & Xie 2022, section 3; Ma et al. 2024), as those names say it."""

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def normed(value, shift, scale):
        return F.layer_norm(value, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    batch, places = len(x), SIDE // PATCH
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH).flatten(2).mT + w["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = F.silu(time + w["y_embedder.embedding_table.weight"][label])
    for block in range(DEPTH):
        at = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{at}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"{at}.attn.qkv", normed(h, shift1, scale1)).reshape(batch, -1, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1[:, None] * linear(f"{at}.attn.proj", seen)
        inner = F.gelu(linear(f"{at}.mlp.fc1", normed(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"{at}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear("final_layer.linear", normed(h, shift, scale)).reshape(batch, places, places, PATCH, PATCH, CHANNELS)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(x.shape)


def official_vae(seed=0, levels=(32, 64), attend=(False, True)):
    """A VAE of latent diffusion's names: a block a level, two on the way up, attention within the levels that `attend`."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}

    def conv(name, into, out, size=3):
        tensors[f"{name}.weight"] = torch.randn(out, into, size, size, generator=random) * 0.1
        tensors[f"{name}.bias"] = torch.randn(out, generator=random) * 0.1

    def norm(name, width):
        tensors[f"{name}.weight"] = 1 + torch.randn(width, generator=random) * 0.1
        tensors[f"{name}.bias"] = torch.randn(width, generator=random) * 0.1

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", into, out)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.nin_shortcut", into, out, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for side, last in (("encoder", 2 * CHANNELS), ("decoder", 3)):
        way = "down" if side == "encoder" else "up"
        conv(f"{side}.conv_in", 3 if way == "down" else CHANNELS, levels[0] if way == "down" else levels[-1])
        width = levels[0] if way == "down" else levels[-1]
        order = range(len(levels)) if way == "down" else reversed(range(len(levels)))
        for level in order:
            for number in range(1 if way == "down" else 2):
                block(f"{side}.{way}.{level}.block.{number}", width, levels[level])
                width = levels[level]
                if attend[level]:
                    attention(f"{side}.{way}.{level}.attn.{number}", width)
            if level != (len(levels) - 1 if way == "down" else 0):
                conv(f"{side}.{way}.{level}.{way}sample.conv", width, width)
        for number in (1, 2):
            block(f"{side}.mid.block_{number}", levels[-1], levels[-1])
        attention(f"{side}.mid.attn_1", levels[-1])
        norm(f"{side}.norm_out", width)
        conv(f"{side}.conv_out", width, last)
    conv("quant_conv", 2 * CHANNELS, 2 * CHANNELS, 1)
    conv("post_quant_conv", CHANNELS, CHANNELS, 1)
    return tensors


def saved(path, **changes):
    settings = argparse.Namespace(path_type="linear", encoder_depth=4, model="SiT-S/2")
    held = {"model": official_sit(1), "ema": official_sit(), "vae": official_vae(), "args": settings, "steps": 7}
    torch.save(held | changes, path)
    return path


def convert(checkpoint, out):
    return main([str(checkpoint), "--out", str(out)])


@torch.no_grad()
def test_a_converted_sit_says_what_the_official_one_says(tmp_path):
    convert(saved(tmp_path / "a.pt"), tmp_path / "release")
    decoder, w = load_decoder(tmp_path / "release"), official_sit()
    x, t, label = torch.randn(3, CHANNELS, SIDE, SIDE), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, CLASSES])
    words = torch.tensor([1, 4, 0]).view(3, 1, 1)  # the last class of the official code is the one that says nothing
    assert decoder.classes == CLASSES
    ours = decoder.sit(x, t, decoder.labels(words)).prediction
    torch.testing.assert_close(ours, official_velocity(w, x, t, label), atol=2e-5, rtol=2e-5)
    assert decoder.sit.config.align_depth == 4
    np.testing.assert_allclose(decoder.vae.statistics[0], w["bn.running_mean"], rtol=1e-6)
    np.testing.assert_allclose(decoder.vae.statistics[1], w["bn.running_var"].sqrt(), rtol=1e-6)


def test_a_converted_vae_is_what_diffusers_makes_of_it(tmp_path):
    official = official_vae(attend=(False, False))
    convert(saved(tmp_path / "a.pt", vae=official), tmp_path / "release")
    ours = AutoencoderKL.from_pretrained(tmp_path / "release" / "vae")
    theirs = convert_ldm_vae_checkpoint(dict(official), ours.config)
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_attention_within_levels_finds_its_place(tmp_path):
    official = official_vae()
    convert(saved(tmp_path / "a.pt"), tmp_path / "release")
    ours = AutoencoderKL.from_pretrained(tmp_path / "release" / "vae").state_dict()
    for there, here in (
        ("encoder.down.1.attn.0.q.weight", "encoder.down_blocks.1.attentions.0.to_q.weight"),
        ("decoder.up.1.attn.1.norm.bias", "decoder.up_blocks.0.attentions.1.group_norm.bias"),
        ("decoder.up.1.attn.0.proj_out.weight", "decoder.up_blocks.0.attentions.0.to_out.0.weight"),
    ):
        assert torch.equal(official[there].flatten(1) if official[there].ndim == 4 else official[there], ours[here])


@torch.no_grad()
def test_attention_over_places_is_that_of_latent_diffusion(tmp_path):
    """One head, softmax(q k / sqrt(c)) v between normalised inputs and their sum with the rest."""
    official, at = official_vae(), "encoder.down.1.attn.0"
    convert(saved(tmp_path / "a.pt"), tmp_path / "release")
    vae: Any = AutoencoderKL.from_pretrained(tmp_path / "release" / "vae")
    ours = vae.encoder.down_blocks[1].attentions[0]
    x = torch.randn(2, 64, 4, 4)
    h = F.group_norm(x, 32, official[f"{at}.norm.weight"], official[f"{at}.norm.bias"], eps=1e-6)
    q, k, v = (F.conv2d(h, official[f"{at}.{n}.weight"], official[f"{at}.{n}.bias"]).flatten(2) for n in ("q", "k", "v"))
    seen = (v @ (q.mT @ k / 8).softmax(-1).mT).unflatten(2, (4, 4))
    expected = x + F.conv2d(seen, official[f"{at}.proj_out.weight"], official[f"{at}.proj_out.bias"])
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_it_draws(tmp_path):
    convert(saved(tmp_path / "a.pt"), tmp_path / "release")
    draw_classes(["--release", f"{tmp_path}/release", "--out", f"{tmp_path}/out", "--n", "2", "--steps", "2"])
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": argparse.Namespace(path_type="cosine")}, "path_type is cosine"),
        ({"ema": official_sit() | {"extra": torch.zeros(1)}}, "unknown tensors, the first extra"),
        ({"ema": {k: v for k, v in official_sit().items() if k != "pos_embed"}}, "lacks pos_embed"),
        ({"ema": {k: v for k, v in official_sit().items() if "final_layer.linear" not in k}}, "lacks final_layer.linear"),
        ({"ema": {k: v for k, v in official_sit().items() if "blocks" not in k}}, "of no published size"),
        ({"ema": official_sit() | {"blocks.0.attn.q_norm.weight": torch.ones(64)}}, "unknown tensors"),
        ({"args": argparse.Namespace(cfg_prob=0.0)}, "have no row for none of them"),
        ({"args": argparse.Namespace(num_classes=CLASSES + 1)}, "have no row for none of them"),
        ({"vae": {k: v for k, v in official_vae().items() if "post_quant" not in k}}, "lacks post_quant_conv.weight"),
        ({"vae": {"conv": torch.zeros(1)}}, "no encoder.down"),
        ({"vae": None}, "no 'vae'"),
        ({"steps": np.random.RandomState}, "no checkpoint of tensors"),
    ],
)
def test_what_is_not_known_is_refused_and_nothing_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(saved(tmp_path / "a.pt", **change), tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    checkpoint, kept = saved(tmp_path / "a.pt"), tmp_path / "releases" / "mine"
    kept.mkdir(parents=True)
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert(checkpoint, tmp_path / "releases")
    assert kept.is_dir()


def test_the_release_holds_tensors_alone_for_all_to_read(tmp_path):
    convert(saved(tmp_path / "a.pt"), tmp_path / "release")
    for path in tmp_path.rglob("release/**/*"):
        needed = 0o055 if path.is_dir() else 0o044
        assert stat.S_IMODE(path.stat().st_mode) & needed == needed
    assert read_json(tmp_path / "release" / "sit" / "config.json")["positions"] == "stored"
    assert torch.equal(
        read_tensors(tmp_path / "release" / "sit" / "model.safetensors")["position"], official_sit()["pos_embed"][0]
    )
