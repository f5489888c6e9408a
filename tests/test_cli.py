from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.files import atomic_folder, write_whole
from sample.cli import run
from sample.pictures import open_picture


def raising(error: BaseException):
    def main(argv: list[str] | None) -> None:
        raise error

    return main


def test_success_is_zero_and_arguments_arrive():
    seen = []
    assert run(seen.append, ["--seed", "3"]) == 0
    assert seen == [["--seed", "3"]]


@pytest.mark.parametrize(
    "error", [ValueError("release: the folder\n  is missing"), OSError("release: the folder is missing")]
)
def test_what_the_user_can_mend_is_one_sentence(error, capsys):
    assert run(raising(error)) == 2
    assert capsys.readouterr().err == "error: release: the folder is missing\n"


def test_the_systems_errors_name_the_file(tmp_path, capsys):
    assert run(lambda _: print((tmp_path / "absent").read_text())) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: No such file or directory\n"


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(AssertionError):
        run(raising(AssertionError()))


def test_ctrl_c_is_130(capsys):
    assert run(raising(KeyboardInterrupt())) == 130


def test_a_folder_that_is_not_replaced_stays(tmp_path, monkeypatch):
    """Ctrl-C between the two renames of `atomic_folder`."""
    folder, rename = tmp_path / "release", Path.rename

    def interrupted(path, target):
        if path.name.endswith(".draft"):
            raise KeyboardInterrupt
        return rename(path, target)

    with atomic_folder(folder) as draft:
        (draft / "a").write_text("old")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as draft:
        (draft / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_was_not_put_back_is_found_again(tmp_path):
    """Killed between the two renames of `atomic_folder`, where nobody puts anything back."""
    folder, left = tmp_path / "release", tmp_path / ".release.17.replaced"
    left.mkdir()
    (left / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(folder):
        raise OSError("disk full")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_write_leaves_nothing(tmp_path):
    def half(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "deep" / "x.txt", half)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("png", ("L", "RGB", "RGBA", "P", "LA", "1", "I;16")),
        ("jpg", ("L", "RGB", "CMYK")),
        ("webp", ("L", "RGB", "RGBA")),
    ],
)
def test_every_mode_opens_as_rgb(tmp_path, suffix, modes):
    for mode in modes:
        Image.new(mode, (9, 5)).save(tmp_path / f"x.{suffix}")
        picture = open_picture(tmp_path / f"x.{suffix}")
        assert picture.mode == "RGB"
        assert picture.size == (9, 5)


def test_transparency_is_laid_over_white_and_exif_turns(tmp_path):
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    picture.save(tmp_path / "x.png", exif=exif)
    opened = open_picture(tmp_path / "x.png")
    assert opened.size == (2, 4)
    assert opened.getpixel((0, 0)) == (255, 255, 255)


def damaged_pictures(folder):
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    bitten = (folder / "whole.jpg").read_bytes()
    Image.new("RGB", (4, 4)).save(folder / "moving.gif")
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    (folder / "short.jpg").write_bytes(bitten[: len(bitten) // 2])
    (folder / "words.png").write_text("not a picture")
    (folder / "empty.jpg").touch()
    return ("short.png", "short.jpg", "words.png", "empty.jpg", "moving.gif", "absent.png", ".")


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    for name in damaged_pictures(tmp_path):
        with pytest.raises(ValueError, match=r"^image "):
            open_picture(tmp_path / name)


def test_a_cameras_jpeg_with_a_small_one_beside_it_is_read(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert Image.open(tmp_path / "camera.jpg").format == "MPO"
    assert np.abs(np.asarray(open_picture(tmp_path / "camera.jpg"), int) - np.asarray(picture)).max() <= 2


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="more than 64,000,000 pixels"):
        open_picture(tmp_path / "huge.png")
