"""The benchmark counts what it says it counts."""

import os
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from transformers import Dinov2Config

from data.batch import LabelledCollate
from data.loader import Data, Loader
from data.shards import Shards
from model.alignment import ProjectorConfig
from model.discriminator import DiscriminatorConfig
from model.files import dump_config, write_json
from model.metaquery import blueprint
from model.targets import TargetConfig
from model.vae import VAEConfig
from sample.measures import read_json
from train import benchmark_drawing, benchmark_loader, benchmark_metaquery, plan, run, stand_in
from train.benchmark import main
from train.benchmark_drawing import Drawn
from train.benchmark_loader import Loading
from train.cost import flop, kept_bytes
from train.repae import RepaeTaskConfig

SMALL = [
    "metaquery",
    "--prefix-tokens",
    "24",
    "--small.queries",
    "4",
    "--batch-size",
    "1",
    "--small.width",
    "64",
    "--small.layers",
    "2",
    "--small.vocabulary",
    "1000",
    "--repeats",
    "1",
]


def test_the_prefix_keeps_no_activations(tmp_path):
    main([*SMALL, "--json", str(tmp_path / "speed.json")])
    measures = read_json(tmp_path / "speed.json")
    assert f"torch {torch.__version__}" in (tmp_path / "speed.machine.txt").read_text()
    assert measures["speed.reading.memory_saving"].value > 1.5  # 28 tokens through the model with a graph, or 4
    assert measures["speed.step_ratio"].value > 0
    assert measures["speed.memory_saving"].value > 1
    assert measures["speed.flop_ratio"].value > 1
    parts = [
        measures[f"speed.part.{part}"].value for part in ("vae", "prefix", "queries", "connector", "decoder", "optimizer")
    ]
    assert min(parts) > 0


def test_talking_is_timed_by_turns_of_the_conversation(tmp_path):
    arguments = ["--turns", "3", "--pictures", "1", "--repeats", "1", "--json", str(tmp_path / "talking.json")]
    main(["talking", *arguments])
    measures = read_json(tmp_path / "talking.json")
    tokens = [measures[f"talking.turn_{number}.tokens"].value for number in (1, 2, 3)]
    assert tokens == sorted(tokens)
    for number in (1, 2, 3):
        one = {part: measures[f"talking.turn_{number}.{part}"].value for part in ("kept", "again", "ratio")}
        assert one["ratio"] == pytest.approx(one["again"] / one["kept"])
    with pytest.raises(ValueError, match="no more pictures than turns"):
        main(["talking", "--turns", "1", "--pictures", "2"])


def test_flop_are_those_of_the_token_passes():
    """Of the language model, a backward pass counted as one more: 2 x 28 tokens against 24 + 2 x 4."""
    args = benchmark_metaquery.Metaquery(prefix_tokens=24, batch_size=1, small=stand_in.Small(queries=4, width=64))
    bench = benchmark_metaquery.Bench(benchmark_metaquery.build(args, "meta"), args, "meta")
    counted = {plain: flop(lambda plain=plain: bench.states(plain)) for plain in (False, True)}
    assert counted[True] / counted[False] == pytest.approx(2 * 28 / 32, rel=0.05)


def test_a_connector_that_looks_has_no_plain_path():
    task: Any = run.named("metaquery.tell_all")().task
    with pytest.raises(ValueError, match=r"connector\.looks"):
        benchmark_metaquery.Bench(blueprint(task.model), benchmark_metaquery.Metaquery(), "meta")


def test_a_recipe_is_counted_at_its_full_size():
    """To the FLOP that the plan counts for a picture by part."""
    args = benchmark_metaquery.Metaquery(config="metaquery.base_sana", prefix_tokens=30, batch_size=2)
    planned = plan.plan(run.named("metaquery.base_sana")(), world=8, prefix_tokens=30)
    assert benchmark_metaquery.counts(args)[False] == pytest.approx(2 * planned["plan.picture.flop"].value, rel=1e-6)


def test_kept_bytes_are_those_autograd_keeps():
    x, weight = torch.randn(10, 100), torch.nn.Parameter(torch.randn(100, 3))
    assert kept_bytes(lambda: (x @ weight).sum()) == x.nbytes  # the weight is not an activation


def test_a_joint_step_is_timed_by_part_and_against_the_official_way(tmp_path):
    main(["repae", "--batch-size", "2", "--repeats", "1", "--json", str(tmp_path / "repae.json")])
    measures = read_json(tmp_path / "repae.json")
    assert measures["speed.step_ratio"].value > 0
    parts = ("encoder", "decoder", "sit", "sit_to_align", "discriminator", "perceptual", "target")
    assert all(measures[f"speed.part.{part}"].value > 0 for part in parts)
    with pytest.raises(ValueError, match="trains no VAE with a SiT"):
        main(["repae", "--config", "repae.world_repa"])


def small_f8d4(folder):
    """The published joint run over small shapes, of which only the config files are there, as a run.json."""
    vae, encoder = folder / "vae", folder / "encoder"
    shape: Any = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    AutoencoderKL(**shape, norm_num_groups=4).save_config(vae)
    Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2).save_pretrained(encoder)
    write_json(encoder / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    published = run.named("repae.xl_f8d4")()
    assert isinstance(published.task, RepaeTaskConfig)
    assert published.task.sit is not None
    sit = replace(published.task.sit, latent_size=8, width=32, depth=4, heads=2, condition_width=32, align_depth=2)
    task = replace(
        published.task,
        vae=VAEConfig(str(vae)),
        sit=sit,
        targets=(TargetConfig(str(encoder)),),
        discriminator=DiscriminatorConfig(width=8, layers=1),
        projector=ProjectorConfig(width=16),
    )
    small = replace(published, task=task, data=replace(published.data, image_size=16))
    write_json(folder / "run.json", dump_config(small))
    return folder / "run.json"


def test_a_published_joint_step_is_timed_lever_by_lever_without_its_weights(tmp_path):
    given = ["--config", str(small_f8d4(tmp_path)), "--random-weights", "--batch-size", "4", "--repeats", "1"]
    main(["repae", *given, "--levers", "--peak-tflops", "1", "--json", str(tmp_path / "repae.json")])
    measures = {name.removeprefix("speed."): value.value for name, value in read_json(tmp_path / "repae.json").items()}
    for lever in ("plain", "cudnn_benchmark", "merged_upsampling", "lpips_bf16"):
        assert measures[f"lever.{lever}_ratio"] == pytest.approx(measures["official_step"] / measures[f"lever.{lever}"])
    assert measures["utilisation"] == pytest.approx(measures["flop"] / measures["step"] / 1e12)
    assert measures["images"] == pytest.approx(4 / measures["step"])
    with pytest.raises(ValueError, match="torch finds none"):
        main(["repae", *given, "--batch-size", "0"])


def test_prompts_are_read_faster_together(tmp_path):
    main(["reading", "--batch-size", "6", "--pictures", "2", "--repeats", "1", "--json", str(tmp_path / "reading.json")])
    measures = read_json(tmp_path / "reading.json")
    assert measures["reading.tokens"].value < measures["reading.padded_tokens"].value
    assert measures["reading.head_tokens"].value > 8
    with pytest.raises(ValueError, match="no more pictures than prompts"):
        main(["reading", "--batch-size", "2", "--pictures", "3"])


@pytest.mark.parametrize("small", [True, False])
def test_both_ways_draw_the_same_pictures(small):
    args = Drawn(small=small, prefix_tokens=24, steps=2)
    model = benchmark_drawing.build(args)
    ours, plain = (draw(model, args, 2) for draw in (benchmark_drawing.ours, benchmark_drawing.plain))
    assert ours.shape == (2, 3, model.image_size, model.image_size)
    assert ours.std() > 0.01
    assert (ours - plain).abs().mean() < (1e-5 if small else 0.1 * ours.std())  # the release's MLLM has 8 bits of mantissa


def test_drawing_is_timed_by_part(tmp_path):
    given = ["--small", "--prefix-tokens", "24", "--pictures", "2", "--steps", "1", "--repeats", "1"]
    main(["drawing", *given, "--json", str(tmp_path / "d.json")])
    measures = {name.removeprefix("drawing."): value.value for name, value in read_json(tmp_path / "d.json").items()}
    assert measures["ratio"] == pytest.approx(measures["ours.rate"] / measures["plain.rate"])
    assert min(measures["2.steps"], measures["2.total"]) > 0
    with pytest.raises(ValueError, match="one branch"):
        main(["drawing", "--guidance", "1"])


def test_the_order_costs_no_more_for_more_samples(tmp_path):
    main(
        ["order", "--samples", "1000", "1000000000", "--places", "50", "--repeats", "2", "--json", str(tmp_path / "o.json")]
    )
    measures = read_json(tmp_path / "o.json")
    assert measures["order.1e9.memory"].value < 1.1 * measures["order.1e3.memory"].value < 4e6
    with pytest.raises(ValueError, match="at least 1"):
        main(["order", "--samples", "0"])


TINY = ["loader", "--samples", "20", "--shard-size", "10", "--batch-size", "5", "--short-side", "48", "--image-size", "32"]


def test_our_loader_is_timed_beside_webdataset_and_bare_decoding(tmp_path):
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    main([*TINY, "--repeats", "1", "--json", str(tmp_path / "loader.json")])
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)
    measures = read_json(tmp_path / "loader.json")
    ratios = ("to_webdataset", "to_webdataset_with_our_map", "to_bare_decode", "with_bad")
    assert all(measures[f"loader.ratio_{name}"].value > 0 for name in ratios)
    rates = ("ours", "with_bad", "webdataset", "bare_decode", "decode.pillow", "decode.pillow_draft", "resize.torch")
    assert all(measures[f"loader.{name}"].value > 0 for name in rates)
    ours, theirs = (measures[f"loader.{name}"].value for name in ("ours", "webdataset"))
    assert measures["loader.ratio_to_webdataset"].value == pytest.approx(ours / theirs)
    with pytest.raises(ValueError, match="multiple of 10 and of the batch size"):
        main([*TINY, "--samples", "24"])


def test_webdataset_and_our_loader_make_the_same_pictures_and_labels(tmp_path):
    args = Loading(samples=20, shard_size=10, batch_size=5, short_side=48, image_size=32)
    jpegs = [benchmark_loader.photograph(number, args.short_side) for number in range(args.samples)]
    benchmark_loader.pack(jpegs, tmp_path / "good", args.shard_size, None)
    ours = {}
    for batch in islice(benchmark_loader.loader(tmp_path / "good", args), 4):
        ours |= dict(zip(batch.labels.tolist(), batch.pixels, strict=True))
    assert len(ours) == 20
    for decoder, prepare in (("pil", benchmark_loader.plain_pixels), (None, benchmark_loader.pixels)):
        seen = []
        for pixels, labels in islice(benchmark_loader.webdataset(tmp_path / "good", args, decoder, prepare), 4):
            seen += labels.tolist()
            off = torch.stack([ours[label] for label in labels.tolist()]) - pixels
            assert off.abs().max() * 127.5 <= (2.001 if decoder else 0)  # levels
        assert sorted(seen) == sorted(ours)


def test_a_tenth_of_the_samples_is_bad_in_five_ways(tmp_path):
    jpegs = [benchmark_loader.photograph(number, 16) for number in range(50)]
    benchmark_loader.pack(jpegs, tmp_path / "bad", 25, 10)
    data = Data((Shards(f"{tmp_path}/bad/*.tar"),), task="labelled", image_size=16, max_bad_share=1.0)
    loader = Loader(data, LabelledCollate(16), 50)
    labels = next(iter(loader)).labels.tolist()
    assert sorted(labels) == sorted(number + (number % 10 == 0) for number in range(50))
    counts = {reason: count for (_, reason), count in loader.rejects.items()}
    assert counts == {"an image cannot be decoded": 3, "a json member cannot be parsed": 1, "no label": 1}


def test_saves_are_timed_in_both_ways(tmp_path):
    main(["saves", "--megabytes", "20", "--steps", "1", "--repeats", "1", "--json", str(tmp_path / "saves.json")])
    measures = read_json(tmp_path / "saves.json")
    assert measures["saves.size"].value == pytest.approx(20e6, rel=0.5)
    assert measures["saves.still_ratio"].value > 0
    with pytest.raises(ValueError, match="at least 1"):
        main(["saves", "--megabytes", "0"])


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        main(["metaquery", "--repeats", "0"])
