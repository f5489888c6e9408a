"""A page of samples: what is in the shards, and nothing that a sample could run."""

import re

from data import preview
from data.pack import Item, write_shards
from tests.test_shards import items, png, write_tar


def test_a_page_shows_samples_of_all_shards(tmp_path, capsys):
    write_shards(items(30), lambda item: item, tmp_path / "set", shard_size=10)
    asked = [f"{tmp_path}/set/*.tar", "--n", "12", "--out", f"{tmp_path}/page.html"]
    assert preview.main(asked) == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count("<article>") == text.count("data:image/jpeg;base64,") == 12
    shown = {int(number) for number in re.findall(r"<figcaption>(\d+)", text)}
    assert {number // 10 for number in shown} == {0, 1, 2}
    preview.main(asked)
    assert (tmp_path / "page.html").read_text() == text
    assert str(tmp_path / "page.html") in capsys.readouterr().out


def test_texts_are_shown_and_never_run(tmp_path):
    item = Item("<script>alert(1)</script> & more", png((1, 2, 3)), (png((4, 5, 6)),), {"note": "<b>"}, png((0, 0, 0)))
    write_shards([item], lambda item: item, tmp_path / "set")
    preview.main([f"{tmp_path}/set/*.tar", "--out", f"{tmp_path}/page.html"])
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert text.count("<img ") == 3  # source, picture, mask


def test_broken_samples_are_shown_as_such(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.png", b"no picture"), ("a.txt", b"a")])
    assert preview.main([f"{tmp_path}/a.tar", "--out", f"{tmp_path}/page.html"]) == 0
    assert "1 x an image cannot be decoded" in (tmp_path / "page.html").read_text()
    for bad in (["--n", "0"], ["--side", "0"]):
        assert preview.main([f"{tmp_path}/a.tar", *bad]) == 2
    assert preview.main([f"{tmp_path}/none.tar"]) == 2
    assert "no shard matches" in capsys.readouterr().err
