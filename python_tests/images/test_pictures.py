"""Finding and reading pictures, good and bad."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffrate_ext.images.pictures import find_pictures, load_pictures, read_picture, spread


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def write(path, colour="red", mode="RGB", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def test_a_folder_is_searched_with_its_subfolders(tmp_path):
    wanted = [write(tmp_path / "a.png"), write(tmp_path / "b" / "c.JPG"), write(tmp_path / "b" / "d" / "e.webp")]
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    assert find_pictures(tmp_path) == wanted
    assert find_pictures(str(tmp_path / "b")) == wanted[1:]


def test_a_file_is_taken_whatever_its_name(tmp_path):
    path = tmp_path / "picture"
    Image.new("RGB", (2, 2)).save(path, format="PNG")
    assert find_pictures(path) == [path]


def test_nothing_to_find(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no pictures \(.*\.png"):
        find_pictures(tmp_path)


def test_spread_takes_from_all_over():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread(list(range(3)), 4) == [0, 1, 2]
    assert spread(list(range(3)), 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        spread([1], 0)


@pytest.mark.parametrize(("mode", "colour"), [("L", 128), ("P", 1), ("1", 1), ("CMYK", (0, 99, 0, 0)), ("I;16", 7)])
def test_other_modes_become_rgb(tmp_path, mode, colour):
    picture = read_picture(write(tmp_path / "a.tif", colour, mode))
    assert picture.mode == "RGB"
    assert picture.size == (6, 4)


def test_transparent_shows_white(tmp_path):
    path = tmp_path / "a.png"
    pixels = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    pixels.putpixel((1, 0), (10, 20, 30, 0))
    pixels.save(path)
    picture = read_picture(path)
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (4, 6)


def test_unreadable_pictures_are_named_and_skipped(tmp_path):
    good = [write(tmp_path / "a.png", "red"), write(tmp_path / "z.png", "blue")]
    text = tmp_path / "text.png"
    text.write_text("no picture")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    cut = write(tmp_path / "cut.png", size=(300, 300))
    cut.write_bytes(cut.read_bytes()[:-60])
    gone = tmp_path / "gone.png"
    loaded = load_pictures([good[0], text, empty, cut, gone, good[1]], to_tensor)
    assert loaded.paths == good
    assert loaded.images.shape == (2, 3, 4, 6)
    assert loaded.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert [path for path, _ in loaded.skipped] == [text, empty, cut, gone]
    reasons = dict(loaded.skipped)
    assert "not a picture" in reasons[text]
    assert "No such file" in reasons[gone]
    assert all(reasons.values())


def test_no_readable_picture_at_all(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"none of the 1 pictures.*a\.png"):
        load_pictures([tmp_path / "a.png"], to_tensor)


def test_errors_of_the_transform_are_not_hidden(tmp_path):
    def broken(picture: Image.Image) -> torch.Tensor:
        raise RuntimeError("the transform is wrong")

    with pytest.raises(RuntimeError, match="the transform is wrong"):
        load_pictures([write(tmp_path / "a.png")], broken)
