"""Our reader and webdataset agree on both sides; damage is named, never skipped in silence."""

import io
import json
import os
import pickle
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from data.pack import Item, write_shards
from data.records import BadSample
from data.shard_index import ShardIndex, index_shard
from data.shards import ShardSource, expand


def png(colour, size=(5, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes) pairs in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def webdataset_samples(folder) -> list[dict[str, Any]]:
    """What webdataset makes of all shards in a folder."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline: Any = WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil")
    return list(pipeline)


def index_or_complaint(path) -> ShardIndex | str:
    try:
        return index_shard(str(path))
    except ValueError as error:
        return str(error)


def items(count):
    return [Item(f"picture {n}", png((n, 2 * n, 3 * n)), described={"number": n}) for n in range(count)]


@pytest.fixture
def shards(tmp_path):
    write_shards(items(7), lambda item: item, tmp_path / "set", shard_size=3)
    return tmp_path / "set"


def test_samples_come_by_number_across_shards(shards):
    source = ShardSource(str(shards / "*.tar"))
    assert [path.name for path in sorted(shards.glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(source) == 7
    for number in (6, 0, 3, 2, 5, 1, 4):
        raw = source.read(number)
        assert raw["key"] == f"{number:09d}"
        assert raw["txt"] == f"picture {number}"
        assert raw["json"]["number"] == number
        assert raw["image"].getpixel((0, 0)) == (number, 2 * number, 3 * number)
        assert raw["sources"] == ()


def test_webdataset_reads_what_we_write(shards):
    theirs = webdataset_samples(shards)
    source = ShardSource(str(shards / "*.tar"))
    assert len(theirs) == len(source)
    for number, sample in enumerate(theirs):
        raw = source.read(number)
        assert (sample["__key__"], sample["txt"], sample["json"]) == (raw["key"], raw["txt"], raw["json"])
        assert sample["png"].tobytes() == raw["image"].tobytes()


def test_we_read_what_webdataset_writes(tmp_path):
    with ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"a/{n}", "png": png((n, 0, 0)), "txt": f"é {n}", "json": {"n": n}, "cls": n})
    theirs = webdataset_samples(tmp_path)
    source = ShardSource(str(tmp_path / "*.tar"))
    ours = [source.read(number) for number in range(len(source))]
    assert [(s["__key__"], s["txt"], s["json"] | {"label": s["cls"]}) for s in theirs] == [
        (r["key"], r["txt"], r["json"]) for r in ours
    ]
    assert all(s["png"].tobytes() == r["image"].tobytes() for s, r in zip(theirs, ours, strict=True))


def test_names_split_at_the_first_dot_and_only_known_kinds_are_read(tmp_path):
    members = [
        ("./dir.v1/a.source1.png", png("blue")),
        ("./dir.v1/b.JPG", png("green")),  # the name lies about the format: decoded by content
        ("./dir.v1/a.source0.png", png("red")),
        ("./dir.v1/a.txt", b"swap"),
        ("./dir.v1/a.png", png("white")),
        ("./dir.v1/a.pkl", b"cposix\nsystem\n(S'touch canary'\ntR."),
        ("./dir.v1/a.txt.gz", b"not opened"),
        ("no_extension", b"x"),
        (".hidden", b"x"),
    ]
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    assert len(source) == 2
    edit = source.read(0)
    assert edit["key"] == "./dir.v1/a"
    assert edit["txt"] == "swap"
    assert [image.getpixel((0, 0)) for image in edit["sources"]] == [(255, 0, 0), (0, 0, 255)]
    assert edit["image"].getpixel((0, 0)) == (255, 255, 255)
    assert source.read(1)["image"].getpixel((0, 0)) == (0, 128, 0)
    assert source.read(1)["txt"] == ""
    assert source.read(1)["json"] == {}


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        member = tarfile.TarInfo("a.png")
        member.size = len(png("red"))
        tar.addfile(member, io.BytesIO(png("red")))
    assert ShardSource(str(tmp_path / "x.tar")).read(0)["txt"] == ""


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("a.png", b"", "an image cannot be decoded"),
        ("a.png", b"GIF89a", "an image cannot be decoded"),
        ("a.txt", b"\xff\xfe", "a text, json or cls member is not UTF-8"),
        ("a.json", b"{", "a json member cannot be parsed"),
        ("a.json", b"[" * 100_000, "a json member cannot be parsed"),
        ("a.json", b"[]", "a json member is not an object"),
        ("a.txt", b"x" * (1 << 20) + b"x", "a member is larger than its kind may be"),
    ],
)
def test_a_broken_member_is_a_bad_sample(tmp_path, member, data, reason):
    source = ShardSource(write_tar(tmp_path / "x.tar", [("a.webp", png("red")), (member, data)]))
    with pytest.raises(BadSample) as caught:
        source.read(0)
    assert caught.value.reason == reason


def test_a_shard_cut_anywhere_is_whole_or_named(shards):
    whole = (shards / "00001.tar").read_bytes()
    expected = index_shard(str(shards / "00001.tar"))
    data_end = int(expected.spans.sum(axis=-1).max())
    cut_path = shards / "cut.tar"
    intact = 0
    for cut in range(0, len(whole), 256):
        cut_path.write_bytes(whole[:cut])
        found = index_or_complaint(cut_path)
        if isinstance(found, str):
            assert f"{cut_path} is damaged" in found
        else:
            intact += 1
            assert cut >= data_end + 512  # only padding is gone
            assert np.array_equal(found.spans, expected.spans)
    assert intact


def test_a_flipped_bit_never_loses_a_member_in_silence(shards):
    whole = (shards / "00001.tar").read_bytes()
    expected = index_shard(str(shards / "00001.tar"))
    flip_path = shards / "flip.tar"
    random = np.random.default_rng(0)
    for position in random.integers(0, len(whole), 300).tolist():
        broken = bytearray(whole)
        broken[position] ^= 1 << int(random.integers(8))
        flip_path.write_bytes(broken)
        (shards / "flip.tar.idx.json").unlink(missing_ok=True)
        found = index_or_complaint(flip_path)
        if isinstance(found, str):
            assert f"{flip_path} is damaged" in found
        else:
            assert np.array_equal(found.spans, expected.spans)
            assert np.array_equal(found.keys, expected.keys)


def test_a_header_zeroed_in_the_middle_is_found(shards):
    path = shards / "00001.tar"
    whole = bytearray(path.read_bytes())
    header = int(index_shard(str(path)).spans[1, :, 0].min()) - 512
    whole[header : header + 512] = bytes(512)  # tarfile and webdataset take this for the end
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"00001\.tar is damaged"):
        ShardSource(str(shards / "*.tar"))


def test_not_a_tar_and_compressed_tar_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"hello" * 500)
    with pytest.raises(ValueError, match=r"x\.tar is damaged or not an uncompressed tar"):
        ShardSource(str(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ValueError, match=r"y\.tar is damaged or not an uncompressed tar"):
        ShardSource(str(tmp_path / "y.tar"))


def test_one_name_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(ValueError, match=r"two members 'a\.TXT'"):
        ShardSource(path)


def test_shards_without_samples_are_refused(tmp_path):
    empty = write_tar(tmp_path / "empty.tar", [("README", b"x")])
    with pytest.raises(ValueError, match="hold no sample"):
        ShardSource(empty)


def test_the_index_is_kept_and_renewed(shards):
    path = shards / "00000.tar"
    cache = shards / "00000.tar.idx.json"
    first = index_shard(str(path))
    made = cache.stat().st_mtime_ns
    again = index_shard(str(path))
    assert cache.stat().st_mtime_ns == made
    assert np.array_equal(first.spans, again.spans)
    assert first.extensions == again.extensions == ("json", "png", "txt")
    cache.write_text(cache.read_text()[:40])  # a cache cut short
    assert np.array_equal(index_shard(str(path)).spans, first.spans)
    write_tar(path, [("z.txt", b"new")])
    assert index_shard(str(path)).keys.tolist() == [b"z"]


def test_a_read_only_folder_keeps_its_index_elsewhere(shards, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shards / "00000.tar.idx.json").mkdir()  # nothing can be written under this name, even by root
    first = index_shard(str(shards / "00000.tar"))
    kept = list((tmp_path / "cache").rglob("*.idx.json"))
    assert len(kept) == 1
    assert len(json.loads(kept[0].read_text())["keys"]) == 3
    assert np.array_equal(index_shard(str(shards / "00000.tar")).spans, first.spans)
    assert not list(shards.glob("*.tmp"))


def test_a_source_travels_to_a_worker_and_holds_few_files(tmp_path):
    for number in range(70):
        write_tar(tmp_path / f"{number:03d}.tar", [("a.txt", str(number).encode())])
    source = ShardSource(str(tmp_path / "{000..069}.tar"))
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(number)["txt"] for number in range(70)] == [str(number) for number in range(70)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert pickle.loads(pickle.dumps(source)).read(3)["txt"] == "3"


def test_a_shard_that_shrinks_while_in_use_is_named(shards):
    source = ShardSource(str(shards / "00000.tar"))
    os.truncate(shards / "00000.tar", 1024)
    with pytest.raises(ValueError, match=r"00000\.tar is not what was indexed"):
        source.read(2)


def test_expand(tmp_path):
    for name in ("b.tar", "a.tar", "c.tar", "note.txt"):
        (tmp_path / name).touch()
    every = [str(tmp_path / name) for name in ("a.tar", "b.tar", "c.tar")]
    assert expand(str(tmp_path / "*.tar")) == every
    assert expand(str(tmp_path / "{a..c}.tar")) == every
    assert expand(str(tmp_path / "{c,a,b,a}.tar")) == every
    with pytest.raises(ValueError, match=r"d\.tar"):
        expand(str(tmp_path / "{a..d}.tar"))


@pytest.mark.parametrize(
    "urls", ["pipe:touch canary", "file:///etc/passwd", "ftp://example.org/0.tar", "pipe://touch canary"]
)
def test_schemes_that_are_not_read(urls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not read: give local paths, or URLs of"):
        ShardSource(urls)
    assert not list(tmp_path.iterdir())
