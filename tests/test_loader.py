"""The global batches are the same for any ranks, workers and interruptions; bad samples are replaced and counted."""

import io
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from data.loader import Data, Loader, World
from data.pack import Item, write_shards
from data.records import BadSample, TextToImage
from data.shards import Shards

GLOBAL_BATCH = 12


class Names:
    """Collate: which sample stands at which global number."""

    def __call__(self, records: Sequence[TextToImage], indices: Sequence[int]) -> dict[int, str]:
        return {index: record.caption for index, record in zip(indices, records, strict=True)}


@pytest.fixture(scope="module")
def data(tmp_path_factory, image):
    """Two sets of shards, 10 and 23 samples, mixed 1:3."""
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (("a", 10), ("b", 23)):
        items = [Item(f"{name}{number}", image) for number in range(count)]
        write_shards(items, lambda item: item, folder / name, shard_size=7)
    return Data(sources=(Shards(f"{folder}/a/*.tar", 1.0), Shards(f"{folder}/b/*.tar", 3.0)))


@pytest.fixture(scope="module")
def image():
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    return stream.getvalue()


def global_batches(data: Data, steps: int, world_size: int = 1, start: int = 0, seed: int = 0) -> list[dict[int, str]]:
    """Steps' batches, all ranks together."""
    merged: list[dict[int, str]] = [{} for _ in range(steps)]
    for rank in range(world_size):
        loader = Loader(data, Names(), GLOBAL_BATCH // world_size, rank, world_size, seed)
        loader.samples = start
        for step, batch in enumerate(islice(loader, steps)):
            assert list(batch) == list(
                range(start + step * GLOBAL_BATCH + rank, start + (step + 1) * GLOBAL_BATCH, world_size)
            )
            merged[step] |= batch
        assert loader.samples == start + steps * GLOBAL_BATCH
    return merged


@pytest.fixture(scope="module")
def straight(data):
    return global_batches(data, steps=20)


def test_batches_differ_and_follow_the_seed(data, straight):
    assert global_batches(data, steps=20) == straight
    other = global_batches(data, steps=20, seed=1)
    assert [batch.keys() for batch in other] == [batch.keys() for batch in straight]
    assert other != straight


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(data, straight, world_size):
    assert global_batches(data, steps=20, world_size=world_size) == straight


@pytest.mark.parametrize("start", [1, 2, 7, 13, 19])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_run_goes_on_where_it_stopped(data, straight, start, world_size):
    assert global_batches(data, 20 - start, world_size, start=start * GLOBAL_BATCH) == straight[start:]


def test_workers_change_nothing(data, straight):
    with_workers = replace(data, workers=2)
    assert global_batches(with_workers, steps=6) == straight[:6]
    assert global_batches(with_workers, steps=4, world_size=2, start=3 * GLOBAL_BATCH) == straight[3:7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_workers_outlive_the_signal_that_a_launcher_sends_to_all(number, data, straight):
    batches = iter(Loader(replace(data, workers=2), Names(), GLOBAL_BATCH))
    seen = [next(batches), next(batches)]  # one of each worker: both have started
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, number)
    seen += islice(batches, len(straight) - 2)
    assert seen == straight


def test_position_counts_what_was_handed_out_not_what_workers_prepared(data):
    loader = Loader(replace(data, workers=1), Names(), GLOBAL_BATCH)
    batches = iter(loader)
    next(batches)
    assert loader.samples == GLOBAL_BATCH
    next(batches)
    assert loader.samples == 2 * GLOBAL_BATCH


def test_each_epoch_covers_each_sample_once_and_shares_are_right(data, straight):
    captions = [name for batch in global_batches(data, 100) for _, name in sorted(batch.items())]
    for name, count in (("a", 10), ("b", 23)):
        own = [caption for caption in captions if caption[0] == name]
        epochs = [own[at : at + count] for at in range(0, len(own) // count * count, count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    share = sum(caption[0] == "b" for caption in captions) / len(captions)
    assert abs(share - 0.75) < 0.05


def test_the_global_random_stream_is_left_alone(data):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(iter(Loader(data, Names(), 2)))
    assert torch.rand(1) == expected


def broken(tmp_path, image, bad: set[int], count: int, shard_size: int = 1000) -> Shards:
    """Shards whose samples with these numbers have no caption."""
    items = [Item("" if number in bad else f"s{number}", image) for number in range(count)]
    write_shards(items, lambda item: item, tmp_path / "set", shard_size)
    return Shards(f"{tmp_path}/set/*.tar")


def test_a_bad_sample_is_replaced_by_the_next_and_counted(tmp_path, image):
    shards = broken(tmp_path, image, {3, 4}, 10)
    for workers in (0, 1):
        loader = Loader(Data((shards,), workers=workers), Names(), 10)
        first = next(iter(loader))
        assert Counter(first.values()) == Counter(f"s{n}" for n in range(10) if n not in (3, 4)) + Counter(["s5", "s5"])
        assert loader.rejects == {(f"{tmp_path}/set/00000.tar", "no caption"): 3}  # 3 -> 4 -> 5, and 4 -> 5


class ShortNames(Names):
    def check(self, record: TextToImage) -> None:
        if record.caption == "s3":
            raise BadSample("too long")


def test_a_collate_may_refuse_records(tmp_path, image):
    shards = broken(tmp_path, image, set(), 10)
    loader = Loader(Data((shards,)), ShortNames(), 10)
    assert sorted(next(iter(loader)).values()) == ["s0", "s1", "s2", "s4", "s4", "s5", "s6", "s7", "s8", "s9"]
    assert loader.rejects == {(f"{tmp_path}/set/00000.tar", "too long"): 1}


def test_a_hundred_bad_samples_in_a_row_end_the_run(tmp_path, image):
    shards = broken(tmp_path, image, set(range(1, 200)), 300)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^100 samples in a row cannot be used: \d+ x no caption"):
            list(islice(Loader(Data((shards,), workers=workers), Names(), 30), 10))


def test_more_than_one_percent_bad_end_the_run_after_a_thousand(tmp_path, image, caplog):
    few = Loader(Data((broken(tmp_path / "few", image, {7}, 150),)), Names(), 50)
    assert len(list(islice(few, 30))) == 30
    assert few.rejects.total() == 10
    assert [record.message for record in caplog.records if record.name == "data.quality"] == [
        f"1 sample(s) replaced so far: no caption, at last in {tmp_path}/few/set/00000.tar"
    ]
    data = Data((broken(tmp_path / "many", image, {7, 70}, 150, shard_size=2),))
    many = Loader(data, Names(), 50)
    with pytest.raises(ValueError, match=r"^13 of 1013 samples cannot be used: \d x no caption"):
        list(islice(many, 30))
    assert many.samples == 950
    assert len(list(islice(Loader(replace(data, max_bad_share=0.02), Names(), 50), 30))) == 30


def test_more_than_one_percent_of_a_shard_end_the_run(tmp_path, image):
    """Among shards that are whole, so that of all samples it is less."""
    loader = Loader(Data((broken(tmp_path, image, set(range(0, 200, 20)), 3_000, shard_size=200),)), Names(), 50)
    with pytest.raises(ValueError, match=r"samples of .*/set/00000\.tar cannot be used: \d+ x no caption .*max_bad_share"):
        list(islice(loader, 200))
    assert loader.rejects.total() <= 0.01 * loader.samples


def test_realised_shares_are_counted(data):
    loader = Loader(data, Names(), GLOBAL_BATCH)
    list(islice(loader, 100))
    counts = dict(loader.read)
    assert list(counts) == [source.urls for source in data.sources]
    assert sum(counts.values()) == 100 * GLOBAL_BATCH
    assert abs(list(counts.values())[1] / (100 * GLOBAL_BATCH) - 0.75) < 0.05


def test_the_world_is_an_endless_source():
    data = Data(sources=(World(seed=1), World(seed=2)))
    batches = global_batches(data, steps=3)
    assert batches == global_batches(data, steps=3, world_size=4)
    assert len({caption for batch in batches for caption in batch.values()}) > 10


@pytest.mark.parametrize(
    ("changes", "batch_size", "message"),
    [
        ({}, 0, "batch size per rank"),
        ({"workers": -1}, 2, "data.workers"),
        ({"max_bad_share": 2}, 2, "data.max_bad_share"),
        ({"sources": ()}, 2, "data.sources"),
    ],
)
def test_impossible_settings_are_refused(changes, batch_size, message):
    with pytest.raises(ValueError, match=message):
        Loader(Data(**changes), Names(), batch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_user_can_mend_comes_from_workers_as_it_was_said(tmp_path, image, workers):
    shards = broken(tmp_path, image, set(), 40)
    loader = Loader(Data((shards,), workers=workers), Names(), 8)
    path = tmp_path / "set" / "00000.tar"
    path.write_bytes(path.read_bytes()[:512])
    with pytest.raises(
        ValueError, match=r"^shard \S+ is not what was indexed; fetch it again, or .*, then python -m data\.index$"
    ):
        list(islice(loader, 3))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stream", [0, 5])
def test_the_first_batch_can_be_seen_before_and_nothing_counts_it(tmp_path, image, workers, stream):
    shards = replace(broken(tmp_path, image, {3}, 40), stream=stream)
    whole, seen = (Loader(Data((shards,), workers=workers), Names(), 8) for _ in range(2))
    shown = seen.first()
    batches = list(islice(whole, 6))
    assert shown == batches[0]
    assert list(islice(seen, 6)) == batches
    assert (seen.read, seen.rejects, seen.samples) == (whole.read, whole.rejects, whole.samples)
