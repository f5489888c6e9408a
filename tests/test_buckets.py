"""Pictures of any aspect ratio in batches of one shape: which shapes there are, who gets which, and the order of it all."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.batch import LabelledCollate
from data.buckets import Buckets
from data.loader import Data, Loader, World
from data.order import BucketedOrder
from data.pack import Item, write_shards
from data.shard_index import index_shard
from data.shards import Shards
from data.transforms import ORIENTATION, UNKNOWN, decode_image, resize_and_crop, to_rgb, to_tensor, upright_shape
from sample.pipeline import Pipeline
from sample.settings import Drawing
from tests import tiny, tiny_repae
from tests.releases import release
from tests.two_ranks import tiny_run
from train.config import Run
from train.engine import EngineConfig
from train.ranks import start
from train.repae import ClassesTold
from train.run import named, parse

ASPECTS = st.floats(1.01, 8)
WORLDS = st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 3), (1, 4), (2, 2)])


@settings(deadline=None)
@given(side=st.integers(1, 20), step=st.sampled_from([8, 32, 64]), max_aspect=ASPECTS)
def test_shapes_keep_the_area_and_stay_within_the_limit(side, step, max_aspect):
    buckets = Buckets(side * step, max_aspect, step)
    assert (side * step, side * step) in buckets.shapes
    assert set(buckets.shapes) == {(width, height) for height, width in buckets.shapes}
    for height, width in buckets.shapes:
        assert height % step == width % step == 0
        assert max(height, width) <= max_aspect * min(height, width)
        assert height * width <= (side * step) ** 2
        assert (height + step) * width > (side * step) ** 2  # no larger height fits this width
    ratios = [height / width for height, width in buckets.shapes]
    assert ratios == sorted(set(ratios), reverse=True)


@settings(deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), max_aspect=ASPECTS)
def test_a_picture_gets_the_shape_that_cuts_least(height, width, max_aspect):
    buckets = Buckets(512, max_aspect, 64)

    def lost(shape: tuple[int, int]) -> float:
        scale = min(height / shape[0], width / shape[1])
        return 1 - shape[0] * shape[1] * scale**2 / (height * width)

    chosen = buckets.shapes[buckets.nearest([(height, width)])[0]]
    assert lost(chosen) <= min(map(lost, buckets.shapes)) + 1e-9


def test_unknown_sizes_are_squares():
    buckets = Buckets(512, 2, 64)
    assert buckets.shapes[buckets.nearest([UNKNOWN])[0]] == (512, 512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((512, 0.5, 64), r"data\.max_aspect is 0\.5"),
        ((500, 2, 64), r"data\.bucket_step is 64"),
        ((512, 2, 0), "bucket_step"),
    ],
)
def test_impossible_buckets(settings, message):
    with pytest.raises(ValueError, match=message):
        Buckets(*settings)


def encoded(width: int, height: int, kind: str = "JPEG", orientation: int = 1) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = orientation
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(stream, kind, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_shape_in_the_header_is_that_of_the_upright_picture(kind, orientation):
    data = encoded(30, 20, kind, orientation)
    picture = to_rgb(decode_image(data))
    assert upright_shape(data) == (picture.height, picture.width)
    assert upright_shape(data[: len(data) * 3 // 4]) in ((picture.height, picture.width), UNKNOWN)


def test_what_has_no_shape():
    assert upright_shape(b"") == upright_shape(b"no picture") == UNKNOWN


def test_a_picture_is_scaled_alike_in_both_directions_and_cut_in_the_middle():
    picture = Image.linear_gradient("L").resize((80, 40)).convert("RGB")
    cut = resize_and_crop(picture, (20, 30))
    by_hand = np.asarray(picture.crop((10, 0, 70, 40)).resize((30, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(cut.numpy().astype(int) - by_hand).max() <= 2
    assert torch.equal(to_tensor(resize_and_crop(picture, (24, 24))), to_tensor(resize_and_crop(picture, 24)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
    parts=WORLDS,
    stop=st.integers(0, 12),
)
def test_every_step_is_of_one_bucket_and_means_the_same_to_any_ranks(lengths, weights, seed, parts, stop):
    """For any sizes of buckets, mixtures, ranks, micro-batches, and going on at any step."""
    batch, steps = 12, 12
    order = BucketedOrder(lengths, weights[: len(lengths)], seed, batch)
    straight = [[order.place(step * batch + row) for row in range(batch)] for step in range(steps)]
    assert all(len({place.pool for place in step}) == 1 for step in straight)
    resumed = BucketedOrder(lengths, weights[: len(lengths)], seed, batch)
    world, accumulation = parts
    micro = batch // accumulation
    for step in range(stop, steps):
        starts = range(step * batch, (step + 1) * batch, micro)
        numbers = [start + row for start in starts for rank in range(world) for row in range(rank, micro, world)]
        assert {n: resumed.place(n) for n in numbers} == dict(enumerate(straight[step], step * batch))


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), batch=st.integers(1, 16))
def test_at_the_end_of_an_epoch_a_bucket_has_given_each_sample_equally_often(lengths, batch):
    """Save the samples of the batch that it has begun: once more, or once less."""
    order, done = BucketedOrder([lengths], [1.0], 3, batch), 0
    given_so_far = [Counter(dict.fromkeys(range(length), 0)) for length in lengths]
    for epoch in range(1, 4):
        end = sum(epoch * length // batch for length in lengths)
        for number in range(done * batch, end * batch):
            place = order.place(number)
            given_so_far[place.pool][place.index] += 1
        done = end
        for length, counts in zip(lengths, given_so_far, strict=True):
            assert max(counts.values()) - min(counts.values()) <= 1
            assert 0 <= epoch * length - counts.total() < batch


def test_an_endless_source_beside_shards():
    order = BucketedOrder([[5, 9], [0]], [1, 1], 0, 4)
    places = [order.place(sample) for sample in range(4000)]
    endless = [place.index for place in places if place.pool == 2]
    assert endless == list(range(len(endless)))
    assert 0.45 < len(endless) / len(places) < 0.55


SIZES = [(60, 40), (40, 60), (50, 50), (90, 45), (41, 60)]  # width and height


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of five sizes, labelled by which."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    items = [Item(f"picture {n}", encoded(*SIZES[n % 5]), described={"label": n % 5}) for n in range(57)]
    write_shards(items, lambda item: item, folder, shard_size=20)
    return folder


def loader(shards, world: int = 1, rank: int = 0, accumulation: int = 1, **changes) -> Loader:
    data = Data((Shards(f"{shards}/*.tar"),), "labelled", image_size=32, max_aspect=2, bucket_step=8)
    data = replace(data, **changes)
    collate = LabelledCollate(32, buckets=data.buckets)
    return Loader(data, collate, 12 // world // accumulation, rank, world, batch_size=12)


def summary(batches: Sequence) -> list[tuple]:
    return [(tuple(b.pixels.shape[1:]), b.index.tolist(), b.labels.tolist(), float(b.pixels.sum())) for b in batches]


def test_batches_have_one_shape_each_that_of_their_pictures(shards):
    buckets = Buckets(32, 2, 8)
    shapes = Counter()
    for batch in islice(loader(shards), 30):
        shape = tuple(batch.pixels.shape[-2:])
        shapes[shape] += 1
        expected = {buckets.shapes[buckets.nearest([SIZES[label][::-1]])[0]] for label in batch.labels.tolist()}
        assert expected == {shape}
    assert set(shapes) == set(buckets.shapes)
    assert min(shapes, key=lambda shape: shapes[shape]) == (32, 32)  # one picture of five


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_accumulation_workers_and_a_stop_change_nothing(shards, world):
    whole = list(islice(loader(shards), 12))
    for accumulation, workers in ((1, 0), (2, 0), (1, 2)):
        shares = [
            list(islice(loader(shards, world, rank, accumulation, workers=workers), 12 * accumulation))
            for rank in range(world)
        ]
        for step, batch in enumerate(whole):
            parts = [b for share in shares for b in share[step * accumulation : (step + 1) * accumulation]]
            numbers = torch.cat([part.index for part in parts])
            order = numbers.argsort()
            assert torch.equal(numbers[order], batch.index)
            assert torch.equal(torch.cat([part.pixels for part in parts])[order], batch.pixels)
    resumed = loader(shards)
    resumed.samples = 5 * 12
    assert summary(list(islice(resumed, 7))) == summary(whole[5:])
    resumed.samples = 5 * 12 + 8  # as after batches of another size
    with pytest.raises(ValueError, match=r"schedule\.batch_size is 12, .* from sample 68, give a size that divides it"):
        next(iter(resumed))


def test_a_world_among_shards_gives_squares(shards):
    mixed = loader(shards, sources=(Shards(f"{shards}/*.tar"), World()))
    batches = list(islice(mixed, 30))
    shapes = {kind: {b.pixels.shape[-2:] for b in batches if type(b.labels) is kind} for kind in (tuple, torch.Tensor)}
    assert shapes[tuple] == {(32, 32)}  # scenes are a world's labels; no batch is of both
    assert len(shapes[torch.Tensor]) == 3


def test_indexes_that_were_made_without_shapes_are_made_anew(shards):
    path = str(sorted(shards.glob("*.tar"))[0])
    assert index_shard(path, shapes=True).shapes is not None
    (shards / (path + ".idx.json")).unlink()
    assert index_shard(path).shapes is None
    found = index_shard(path, shapes=True).shapes
    assert found is not None
    assert found.tolist() == [list(SIZES[n % 5][::-1]) for n in range(20)]


def test_streams_and_latents_have_no_buckets(shards):
    with pytest.raises(ValueError, match=r"data\.max_aspect: the shapes of a stream"):
        loader(shards, sources=(Shards(f"{shards}/*.tar", stream=5),))
    with pytest.raises(ValueError, match="latents are those of squares"):
        loader(shards, sources=(Shards(f"{shards}/*.tar", latents="anywhere"),))


def trained(run: Run, shards, task: str) -> list[tuple[int, ...]]:
    """Shapes of the pictures of six steps of a run, all of which were taken."""
    source = (Shards(f"{shards}/*.tar"),)
    data = replace(run.data, sources=source, task=task, image_size=16, max_aspect=2, bucket_step=4)
    run = replace(run, data=data, schedule=replace(run.schedule, batch_size=4, accumulation=1))
    ranks = start(timeout_seconds=60)
    built: Any = run.task.build(run, ranks)
    shapes = []
    for batch in islice(built.batches(0), 6):
        shapes.append(tuple(batch.pixels.shape[-2:]))
        assert torch.isfinite(built.step(batch)["loss"])
    assert all(engine.last is not None and engine.last.objection is None for engine in built.engines.values())
    return shapes


def test_a_bridge_trains_on_all_shapes_and_draws_them(shards, tmp_path):
    tiny.metaquery_config(tmp_path)
    run = parse(tiny_run(tmp_path, tmp_path / "out", "--engine.precision", "fp32"))
    assert len(set(trained(run, shards, "t2i"))) > 1
    pipeline = Pipeline.from_release(release(tmp_path / "release"))
    (picture,) = pipeline(["a star"], [1], Drawing(2, height=8, width=32))
    assert picture.size == (32, 8)
    with pytest.raises(ValueError, match="height 9, width 16: VAE and decoder take multiples of 4"):
        pipeline(["a star"], [1], Drawing(2, height=9))


def test_joint_training_takes_all_shapes(shards, tmp_path):
    run = tiny_repae.repae_run(tmp_path, EngineConfig(precision="fp32"), told=ClassesTold(classes=5))
    assert len(set(trained(run, shards, "labelled"))) > 1


def test_a_task_of_squares_refuses_shapes(shards):
    run = named("world.decoder")()
    data = replace(run.data, sources=(Shards(f"{shards}/*.tar"),), max_aspect=2, bucket_step=8)
    with pytest.raises(ValueError, match=r"data\.max_aspect is 2, and this task learns from squares alone"):
        run.task.build(replace(run, data=data), start(timeout_seconds=60))


def test_shapes_that_the_autoencoder_cannot_take_are_refused(shards, tmp_path):
    run = tiny_repae.repae_run(tmp_path, EngineConfig(precision="fp32"), told=ClassesTold(classes=5))
    data = replace(run.data, sources=(Shards(f"{shards}/*.tar"),), max_aspect=2, bucket_step=1)
    with pytest.raises(ValueError, match=r"data\.bucket_step is 1; VAE and decoder take multiples of 4"):
        run.task.build(replace(run, data=data), start(timeout_seconds=60))
