"""Shards on a web server give what local ones give, byte for byte and in the same order."""

import os
import pickle
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from random import Random
from threading import Thread

import pytest

from data import index, lint, precompute, storage
from data.loader import Data, Loader
from data.pack import Item, write_shards
from data.records import BadSample
from data.shard_index import MAX_BYTES
from data.shards import Shards, ShardSource, expand
from data.storage import CacheConfig, Span, Urls
from data.stream import StreamSource
from tests.test_loader import Names, global_batches
from tests.test_shards import png, write_tar
from tests.web import serve

SAMPLES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards with their indexes beside them."""
    folder = tmp_path_factory.mktemp("remote") / "set"
    items = [Item(f"picture {number}", png((number, 7, 9))) for number in range(SAMPLES)]
    write_shards(items, lambda item: item, folder, shard_size=8)
    assert index.main([f"{folder}/*.tar", "--jobs", "1"]) == 0
    return folder


@pytest.fixture
def site(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)
    with serve(folder) as found:
        yield found


def urls(site) -> str:
    return site.url + "/{00000..00002}.tar"


def test_the_samples_are_those_of_local_shards(site, folder):
    here, there = ShardSource(f"{folder}/*.tar"), ShardSource(urls(site))
    assert len(there) == SAMPLES
    for number in range(SAMPLES):
        ours, theirs = here.read(number), there.read(number)
        assert ours.pop("image").tobytes() == theirs.pop("image").tobytes()
        assert ours == theirs
    assert pickle.loads(pickle.dumps(there)).read(3)["txt"] == "picture 3"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_batches_and_each_sample_once_over_the_network(site, folder, workers):
    local = Data(sources=(Shards(f"{folder}/*.tar"),))
    remote = replace(local, sources=(Shards(urls(site)),), workers=workers)
    assert global_batches(remote, steps=10) == global_batches(local, steps=10)  # six epochs
    before = len(site.ranges)
    assert len(set(site.ranges)) == SAMPLES
    assert before == SAMPLES or workers  # two workers may ask for the same at the same time
    assert global_batches(remote, steps=5, world_size=2) == global_batches(local, steps=5)
    assert len(site.ranges) == before  # the cache is shared, and outlives the process


def test_a_batch_is_fetched_at_once(site):
    source = ShardSource(urls(site))
    source.fetch(range(SAMPLES))
    fetched = len(site.ranges)
    assert fetched == SAMPLES
    assert [source.read(number)["txt"] for number in range(SAMPLES)] == [f"picture {n}" for n in range(SAMPLES)]
    assert len(site.ranges) == fetched


def test_the_cache_is_bounded_and_keeps_what_was_read_last(site, folder, tmp_path):
    size = (folder / "00000.tar").stat().st_size
    caches = [Urls(CacheConfig(tmp_path / "small", gigabytes=100e3 / 1e9)) for _ in range(3)]  # as of three processes
    held, last = [], Span(f"{site.url}/00000.tar", 0, size)
    for start in range(0, 200):
        cache = caches[start % 3]
        piece = Span(last.path, start, start + 4096)
        assert cache.read(piece) == (folder / "00000.tar").read_bytes()[start : start + 4096]
        assert cache.read(held[0] if held else piece)  # the first is read again and again
        held.append(piece)
        total = sum(path.stat().st_size for path in (tmp_path / "small").rglob("*") if path.is_file())
        assert total <= 100e3
    before, cache = len(site.ranges), caches[0]
    cache.read(held[0])
    cache.read(held[-1])
    assert len(site.ranges) == before
    cache.read(held[50])  # long gone
    assert len(site.ranges) == before + 1


def test_a_network_that_fails_for_a_moment_costs_nothing(site):
    source = ShardSource(urls(site))
    site.failing = 3
    assert source.read(0)["txt"] == "picture 0"


def test_a_network_that_stays_away_ends_the_run_with_the_address(site):
    source = ShardSource(urls(site))
    site.failing = 10**6
    with pytest.raises(OSError, match=rf"{site.url}/00000\.tar does not come after 6 tries .*503"):
        source.read(0)


def test_a_server_without_ranges_is_named(site):
    source = ShardSource(urls(site))
    site.whole = True
    with pytest.raises(OSError, match=r"00000\.tar comes whole .* must serve ranges"):
        source.read(0)


def test_a_shard_that_is_not_the_indexed_one_is_named(folder, site, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    with serve(tmp_path / "other") as other:
        source = ShardSource(urls(other))
        items = [Item(f"much longer picture {number}", png((number, 7, 9), size=(30, 30))) for number in range(8)]
        write_shards(items, lambda item: item, tmp_path / "new")
        os.replace(tmp_path / "new" / "00000.tar", tmp_path / "other" / "00000.tar")
        with pytest.raises(ValueError, match=r"00000\.tar is not what was indexed; fetch it again"):
            source.read(1)


def test_shards_without_an_index_are_indexed_from_here(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / "bare" / name)
    with serve(tmp_path / "bare") as site:
        with pytest.raises(ValueError, match=r"00000\.tar has no index of version 3; make it with data\.index, or set"):
            ShardSource(urls(site))
        assert index.main([urls(site), "--jobs", "1", "--out", str(tmp_path / "indexes")]) == 0
        names = sorted(path.name for path in (tmp_path / "indexes").iterdir())
        assert names == [f"{n:05d}.tar.idx.json" for n in range(3)]
        assert index.main([urls(site), "--jobs", "1"]) == 0  # into the user's cache folder
        assert ShardSource(urls(site), shapes=True).shapes.tolist() == [[4, 5]] * SAMPLES
        assert index.main([urls(site), "--verify", "--jobs", "1"]) == 0
        broken = bytearray((tmp_path / "bare" / "00001.tar").read_bytes())
        broken[700] ^= 1
        (tmp_path / "bare" / "00001.tar").write_bytes(broken)
        capsys.readouterr()
        assert index.main([urls(site), "--verify", "--jobs", "1"]) == 1
        assert "00001.tar is damaged" in capsys.readouterr().err


def test_an_object_store_is_listed(folder):
    """fsspec's own store in memory stands for one; what differs between stores is fsspec's."""
    import fsspec

    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    known = storage.SCHEMES
    storage.SCHEMES = (*known, "memory")
    try:
        assert expand("memory://bucket/*.tar") == [f"memory:///bucket/{n:05d}.tar" for n in range(3)]
        here, there = ShardSource(f"{folder}/*.tar"), ShardSource("memory://bucket/*.tar")
        assert [there.read(n)["txt"] for n in range(SAMPLES)] == [here.read(n)["txt"] for n in range(SAMPLES)]
    finally:
        storage.SCHEMES = known


def test_a_web_server_is_not_listed():
    with pytest.raises(ValueError, match="no web server lists its files; name them with braces"):
        expand("https://example.org/*.tar")
    signed = "https://example.org/a.tar?signature=x"
    assert expand(signed) == [signed]
    assert storage.beside(signed, ".idx.json") == "https://example.org/a.tar.idx.json?signature=x"


def test_what_works_on_local_shards_alone_says_so(site, capsys, tmp_path):
    vae = ["--vae.path", "nowhere", "--image-size", "8", "--out", str(tmp_path / "latents")]
    for main, arguments in ((lint.main, [urls(site)]), (precompute.main, [urls(site), *vae])):
        assert main(arguments) == 2
        assert "only local shards can be worked on; fetch them first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="latents belong to local shards"):
        ShardSource(urls(site), latents=str(tmp_path))


def test_local_and_remote_shards_are_two_sources(folder):
    with pytest.raises(ValueError, match="partly local and partly elsewhere; give two sources"):
        expand("{" + str(folder / "00000.tar") + ",https://example.org/0.tar}")


# streams


def streamed(source: str, **changes) -> Data:
    return replace(Data(sources=(Shards(source, stream=6),)), **changes)


@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_stream_gives_every_sample_equally_often(site, folder, place):
    source = f"{folder}/*.tar" if place == "local" else urls(site)
    batches = list(islice(Loader(streamed(source), Names(), 12), 40))
    seen = [caption for batch in batches for caption in batch.values()]
    counts = {name: seen.count(name) for name in seen}
    assert len(counts) == SAMPLES
    assert max(counts.values()) - min(counts.values()) <= 3  # the buffer holds six, the last pass is not whole
    assert seen[:SAMPLES] != sorted(seen[:SAMPLES])


def test_ranks_and_workers_of_a_stream_share_the_shards(folder):
    for world, workers in ((2, 0), (1, 2), (2, 2)):
        data = streamed(f"{folder}/*.tar", workers=workers)
        seen: list[str] = []
        for rank in range(world):
            loader = Loader(data, Names(), 10, rank, world)
            seen += [caption for batch in islice(loader, 24 // world) for caption in batch.values()]
        counts = {name: seen.count(name) for name in seen}
        assert len(counts) == SAMPLES  # no rank and no worker reads the same shards as another all the time
        assert max(counts.values()) - min(counts.values()) <= 10


def test_a_stream_goes_on_in_another_order(folder):
    loader = Loader(streamed(f"{folder}/*.tar"), Names(), 10)
    first = list(next(iter(loader)).values())
    again = Loader(streamed(f"{folder}/*.tar"), Names(), 10)
    assert list(next(iter(again)).values()) == first
    again.samples = 50
    assert list(next(iter(again)).values()) != first


def test_a_damaged_shard_of_a_stream_is_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    whole = (tmp_path / "set" / "00001.tar").read_bytes()
    (tmp_path / "set" / "00001.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    loader = Loader(streamed(f"{tmp_path}/set/*.tar", max_bad_share=0.5), Names(), 10)
    list(islice(loader, 20))
    (shard, reason), count = loader.rejects.most_common(1)[0]
    assert (os.path.basename(shard), reason) == ("00001.tar", "a shard is damaged")
    assert count >= 5


def test_streams_of_nothing_end(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="hold no sample"):
        next(iter(Loader(streamed(f"{tmp_path}/set/*.tar"), Names(), 2)))


def test_a_shard_without_samples_is_passed_over(tmp_path):
    """However often: of two ranks and two shards, one comes upon it again and again."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(bytes(10240))
    write_tar(tmp_path / "set" / "1.tar", [("a.txt", b"a")])
    for rank in range(2):
        source = StreamSource(f"{tmp_path}/set/*.tar", 1, 0, rank, 2)
        assert [source.read(number)["txt"] for number in range(20)] == ["a"] * 20


def test_a_member_that_is_too_large_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", [("a.txt", b"a" * (MAX_BYTES["txt"] + 1)), ("b.txt", b"b")])
    assert index.main([f"{tmp_path}/set/*.tar", "--jobs", "1"]) == 0
    with serve(tmp_path / "set") as site:
        source = ShardSource(f"{site.url}/0.tar")
        source.fetch([0, 1])
        with pytest.raises(BadSample, match="larger than its kind may be"):
            source.read(0)
        assert source.read(1)["txt"] == "b"
        assert len(site.ranges) == 1


def test_a_moment_without_the_index_or_the_shard_costs_nothing(site, capsys):
    site.failing = 2
    assert len(ShardSource(urls(site))) == SAMPLES
    site.failing = 2
    assert index.main([site.url + "/00000.tar", "--jobs", "1"]) == 0
    site.failing = 2
    assert len(list(islice(Loader(streamed(urls(site)), Names(), 10), 3))) == 3
    site.failing = 10**6
    with pytest.raises(OSError, match=r"00000\.tar\.idx\.json\?other does not come after 6 tries .*503"):
        ShardSource(site.url + "/00000.tar?other")
    assert index.main([site.url + "/00000.tar", "--jobs", "1"]) == 1
    assert "00000.tar does not come after 6 tries" in capsys.readouterr().err
    with pytest.raises(OSError, match=r"tar does not come after 6 tries .*503"):
        next(iter(Loader(streamed(urls(site)), Names(), 10)))


def test_signed_addresses_find_their_indexes(site, folder, tmp_path):
    """Beside the shard with the same query, or, where a signature is for one file alone, in the user's cache folder."""
    signed = "{00000..00001}.tar?X-Signature=ab"
    assert len(ShardSource(f"{site.url}/{signed}")) == 16
    shutil.copy(folder / "00000.tar", tmp_path / "bare.tar")
    with serve(tmp_path) as bare:
        bare.signed = "bare.tar"
        url = bare.url + "/bare.tar?X-Signature=ab"
        with pytest.raises(ValueError, match=r"has no index of version 3; make it with data\.index"):
            ShardSource(url)
        assert index.main([url, "--jobs", "1"]) == 0
        assert ShardSource(url).read(0)["txt"] == "picture 0"


def test_a_renewed_signature_is_the_same_data(site):
    first, renewed = (f"{site.url}/{{00000..00001}}.tar?X-Signature={key}" for key in ("ab", "cd"))
    assert ShardSource(first).fingerprint() == ShardSource(renewed).fingerprint()
    assert StreamSource(first, 4, 0).fingerprint() == StreamSource(renewed, 4, 0).fingerprint()


def test_a_server_without_ranges_ends_a_stream_instead_of_its_data(tmp_path, monkeypatch):
    """Python's own web server gives whole files alone: behind its first block, a large shard cannot be read."""
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.0)
    noise = Random(0)
    members = [(f"{number}.png", noise.randbytes(1 << 20)) for number in range(12)]
    write_tar(tmp_path / "0.tar", members)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        source = StreamSource(f"http://127.0.0.1:{server.server_port}/0.tar", 1, 0)

        def read_on() -> None:
            for number in range(20):
                with suppress(BadSample):  # noise is no picture
                    source.read(number)

        with pytest.raises(OSError, match=r"0\.tar does not come after 6 tries .*range requests"):
            read_on()
        server.shutdown()


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"s3://bucket/0\.tar needs a package that is not installed; pip install s3fs"):
        StreamSource("s3://bucket/0.tar", 1, 0).read(0)


def test_drafts_that_other_processes_rename_do_not_disturb(site, tmp_path):
    cache = Urls(CacheConfig(tmp_path / "small", gigabytes=100e3 / 1e9))
    span = Span(f"{site.url}/00000.tar", 0, 4096)
    cache.read(span)
    (next((tmp_path / "small").glob("*/*")).parent / "gone.part").symlink_to(tmp_path / "renamed")
    for start in range(4096, 20480, 512):
        cache.read(Span(span.path, start, start + 4096))
