"""Everything that is wrong with shards is said, by shard and sample; nothing else is."""

import gc
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from data import lint
from data.pack import write_shards
from data.records import Task
from data.shard_index import index_shard
from tests.test_buckets import encoded
from tests.test_shards import items, png, write_tar

PICTURE = png((10, 20, 30))
SAMPLE = [("a.png", PICTURE), ("a.txt", b"a caption")]


def problems(tmp_path, members, task: Task = "t2i"):
    """{(key, problem)} of one shard."""
    path = write_tar(tmp_path / "shard.tar", members)
    return {(found.key, found.problem) for found in lint.lint(path, task)}


def test_good_shards_have_no_problem(tmp_path, capsys):
    write_shards(items(7), lambda item: item, tmp_path / "set", shard_size=3)
    assert lint.main([f"{tmp_path}/set/*.tar", "--jobs", "1", "--json", f"{tmp_path}/found.json"]) == 0
    assert "shards 3, problems 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text()) == []


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([*SAMPLE, ("noextension", b"?")], ("noextension", "a name without an extension, which is never read")),
        ([*SAMPLE, ("b.pkl", b"?")], ("b.pkl", "a member of kind pkl, which is never read")),
        (
            [("photo.v2.png", PICTURE), ("photo.v2.txt", b"a caption")],
            ("photo.v2.png", "a dot within the name: what follows the first is taken for the extension"),
        ),
        (
            [("a.png", PICTURE), ("b.png", PICTURE), ("b.txt", b"b"), ("a.txt", b"a")],
            ("a.txt", "a member that lies apart from the rest of its sample"),
        ),
        ([*SAMPLE, ("a.png", PICTURE)], ("a.png", "a member that occurs twice")),
        ([*SAMPLE, ("../../b.png", PICTURE)], ("../../b.png", "a name that points outside of the archive")),
        ([*SAMPLE, ("b.png", b"no picture"), ("b.txt", b"b")], ("b", "an image cannot be decoded")),
        ([*SAMPLE, ("b.png", b""), ("b.txt", b"b")], ("b", "an image cannot be decoded")),
        ([*SAMPLE, ("b.png", PICTURE)], ("b", "no caption")),
        ([*SAMPLE, ("b.txt", b"b")], ("b", "no image")),
        ([*SAMPLE, ("b.png", PICTURE), ("b.txt", b"\xff")], ("b", "a text, json or cls member is not UTF-8")),
        ([*SAMPLE, ("b.png", PICTURE), ("b.txt", b"b"), ("b.json", b"{")], ("b", "a json member cannot be parsed")),
    ],
)
def test_each_problem_is_named(members, expected, tmp_path):
    assert expected in problems(tmp_path, members)


def test_what_one_sample_lacks_and_the_others_have(tmp_path):
    members = [
        (f"{n:03d}.{kind}", data) for n in range(20) for kind, data in (("png", PICTURE), ("txt", b"x"), ("json", b"{}"))
    ]
    members.remove(("007.json", b"{}"))
    assert problems(tmp_path, members) == {("007", "no json, which the others have")}


def test_pictures_of_another_format_and_conversations_about_nothing_seen_are_well(tmp_path):
    mixed = [(f"{n:03d}.{kind}", data) for n in range(20) for kind, data in (("png", PICTURE), ("txt", b"x"))]
    mixed[-2] = ("019.jpg", encoded(6, 4))
    assert problems(tmp_path, mixed) == set()
    said = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}).encode()
    talks = [(f"{n:03d}.{kind}", data) for n in range(20) for kind, data in (("png", PICTURE), ("json", said))]
    talks.remove(("007.png", PICTURE))
    assert problems(tmp_path, talks, "chat") == set()


def test_a_damaged_archive_is_a_problem_of_the_shard(tmp_path):
    path = tmp_path / "shard.tar"
    write_tar(path, [*SAMPLE, ("b.png", PICTURE), ("b.txt", b"b")])
    whole = path.read_bytes()
    for end in range(512, 4 * 1024 + 512, 512):  # four members of two blocks each; one zero block more, and nothing is lost
        path.write_bytes(whole[:end])
        found = lint.lint(str(path), "t2i")
        assert any(p.key == "" and "damaged" in p.problem for p in found), end


def test_a_size_that_has_changed_in_place_is_a_problem_of_its_sample(tmp_path):
    """Under an index that is still taken for its own."""
    path = tmp_path / "shard.tar"
    write_tar(path, [*SAMPLE, ("b.png", PICTURE), ("b.txt", b"b")])
    times = path.stat()
    index_shard(str(path))
    whole = bytearray(path.read_bytes())
    at = whole.index(b"b.txt") + 124
    whole[at : at + 11] = b"00000000007"
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = [p for p in lint.lint(str(path), "t2i") if "is not what was indexed" in p.problem]
    assert [p.key for p in found] == ["b"]


def test_a_link_is_never_followed(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("secret.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert ("secret.txt", "a link or device, which is never read") in {
        (p.key, p.problem) for p in lint.lint(str(path), "t2i")
    }


def test_no_file_stays_open(tmp_path):
    path = write_tar(tmp_path / "0.tar", SAMPLE)
    lint.lint(path, "t2i")
    gc.collect()
    assert path not in [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]


def test_the_task_decides_what_is_missing(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    assert ("a", "no source image") in problems(tmp_path, SAMPLE, task="edit")
    assert ("a", "no label") in problems(tmp_path, SAMPLE, task="labelled")
    assert ("a", "no messages") in problems(tmp_path, SAMPLE, task="chat")


def test_the_page_tells_counts_and_places(tmp_path, capsys):
    for name in ("one", "two"):
        write_tar(tmp_path / f"{name}.tar", [*SAMPLE, ("b.png", PICTURE)])
    assert lint.main([f"{tmp_path}/*.tar", "--json", f"{tmp_path}/found.json"]) == 1
    said = capsys.readouterr().out
    assert "2 x no caption" in said
    assert f"{tmp_path}/two.tar b" in said
    assert {"shard": f"{tmp_path}/one.tar", "key": "b", "problem": "no caption"} in json.loads(
        (tmp_path / "found.json").read_text()
    )
    assert lint.main([f"{tmp_path}/none*.tar"]) == 2
