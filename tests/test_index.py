"""Indexes made ahead of training; every changed byte is found."""

import os
import random

import pytest

from data import index
from data.pack import write_shards
from data.shard_index import index_shard
from tests.test_shards import items, png, write_tar


@pytest.fixture
def shards(tmp_path):
    write_shards(items(7), lambda item: item, tmp_path / "set", shard_size=3)
    return tmp_path / "set"


def run(shards, *options):
    return index.main([f"{shards}/*.tar", "--jobs", "1", *options])


def test_indexes_are_made_and_serve_training(shards, capsys):
    assert run(shards) == 0
    assert "samples 7, shards 3 of 3" in capsys.readouterr().out
    assert len(list(shards.glob("*.idx.json"))) == 3
    assert len(index_shard(str(shards / "00000.tar"))) == 3
    assert run(shards, "--verify") == 0


def test_an_index_that_can_be_kept_nowhere_is_no_success(shards, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for place in ("00000", "00001", "00002"):
        (shards / f"{place}.tar.idx.json").mkdir()  # nothing can take a folder's place
    assert run(shards) == 1
    assert "cannot be written to" in capsys.readouterr().err
    assert len(index_shard(str(shards / "00000.tar"))) == 3  # training goes on without


def test_a_copy_with_another_date_is_verified_too(shards):
    """Whatever trained on it meanwhile and made its index anew; until it is indexed again, the first bytes count."""
    run(shards)
    path = shards / "00001.tar"
    os.utime(path, ns=(1, 1))
    assert len(index_shard(str(path))) == 3
    assert run(shards, "--verify") == 0
    path.write_bytes(path.read_bytes().replace(b"picture 4", b"picture X"))
    assert run(shards, "--verify") == 1
    assert run(shards) == 0
    assert run(shards, "--verify") == 0


def test_processes_find_what_one_finds(shards, capsys):
    run(shards)
    alone = capsys.readouterr().out
    assert index.main([f"{shards}/*.tar", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == alone.splitlines()[-1]


def test_every_flipped_bit_is_found(shards, capsys):
    """Of 200 anywhere in a shard, with its size and date as they were."""
    run(shards)
    path = shards / "00001.tar"
    whole, chance = path.read_bytes(), random.Random(0)
    state = path.stat()
    for _ in range(200):
        broken = bytearray(whole)
        place = chance.randrange(len(whole) * 8)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert index._verified(str(path)).problem is not None
    assert run(shards, "--verify") == 1
    assert "00001.tar is damaged: its bytes are not those that were indexed" in capsys.readouterr().err


def test_what_cannot_be_verified_says_so(shards, tmp_path, capsys):
    assert run(shards, "--verify") == 1
    assert "has no sha256 to compare with" in capsys.readouterr().err
    damaged = shards / "00002.tar"
    damaged.write_bytes(damaged.read_bytes()[:700])
    write_tar(shards / "00003.tar", [("a.png", png((1, 2, 3))), ("a.txt", b"one")])
    assert run(shards) == 1
    said = capsys.readouterr()
    assert "00002.tar is damaged" in said.err
    assert "shards 3 of 4" in said.out
    assert index.main([f"{tmp_path}/none/*.tar"]) == 2
    assert index.main([f"{shards}/*.tar", "--jobs", "-1"]) == 2


def test_indexes_of_one_name_are_not_written_over_each_other(shards, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "00000.tar", [("a.txt", b"one")])
    assert index.main([f"{tmp_path}/{{set,other}}/*.tar", "--jobs", "1", "--out", str(tmp_path / "out")]) == 2
    assert "two shards have the same name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
