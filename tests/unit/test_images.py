from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.data import shapes
from stepdistill.data.images import load_images
from stepdistill.errors import UserError


def add(folder: Path, name: str, size: tuple[int, int] = (40, 40), color: object = "red", caption: str | None = "a"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder / name


def test_shapes_images_are_the_rendered_scenes_with_their_captions():
    scenes = [shapes.captioned_scene(9, i) for i in (4, 0)]
    images, captions = load_images("shapes", seed=9).batch([4, 0])
    assert torch.equal(images, shapes.to_tensor([shapes.render(s.scene) for s in scenes]))
    assert captions == [s.caption for s in scenes]
    assert images.shape == (2, 3, 64, 64)


def test_endless_shapes_never_repeat_and_resume_by_number():
    source = load_images("shapes")
    assert source.indices(0, 5, 3) == [5, 6, 7]
    assert torch.equal(source.batch([10**9]).images, load_images("shapes").batch([10**9]).images)


def test_a_folder_is_cropped_at_the_centre_and_scaled_to_minus_one_and_one(tmp_path):
    image = Image.new("RGB", (80, 40), "black")
    image.paste("white", (20, 0, 60, 40))  # exactly the square that a centre crop keeps
    add(tmp_path, "a.png", caption=" a  white square\n")
    image.save(tmp_path / "a.png")
    images, captions = load_images(tmp_path, size=16).batch([0])
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.ones_like(images))
    assert captions == ["a white square"]


def test_transparency_becomes_white_and_rotation_marks_are_obeyed(tmp_path):
    add(tmp_path, "clear.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    upright = Image.new("RGB", (20, 20), "black")
    upright.paste("white", (0, 0, 20, 10))
    add(tmp_path, "turned.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    upright.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
    images, _ = load_images(tmp_path, size=20).batch([0, 1])
    assert (images[0] == 1).all()
    assert (images[1, :, 0] == 1).all()
    assert (images[1, :, -1] == -1).all()


def test_captions_come_from_metadata_too_and_nested_folders_count(tmp_path):
    add(tmp_path / "sub", "x.png", caption=None)
    add(tmp_path, "y.jpg", caption="beside")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/x.png", "text": "told"}) + "\n\n")
    source = load_images(tmp_path, size=8)
    assert sorted(source.batch([0, 1]).captions) == ["beside", "told"]


def test_what_is_left_out_is_counted_by_rule(tmp_path):
    add(tmp_path, "good.png")
    add(tmp_path, "mute.png", caption=None)
    add(tmp_path, "blank.png", caption=" \n")
    add(tmp_path, "tiny.png", size=(40, 7))
    source = load_images(tmp_path, size=8)
    assert source.batch([0]).captions == ["a"]
    assert source.dropped == {"without a caption": 1, "with a blank caption": 1, "smaller than 8 pixels": 1}
    assert source.summary().startswith("1 images")


def test_no_image_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(UserError, match="none of 0 images"):
        load_images(tmp_path, size=8)
    add(tmp_path, "mute.png", caption=None)
    with pytest.raises(UserError, match="1 without a caption"):
        load_images(tmp_path, size=8)


def test_a_damaged_image_is_named_when_the_folder_is_opened(tmp_path):
    add(tmp_path, "good.png")
    add(tmp_path, "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        load_images(tmp_path, size=8)


def test_an_image_whose_pixels_are_cut_off_is_named_when_it_is_read(tmp_path):
    path = add(tmp_path, "cut.png", size=(200, 200))
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:2000])
    source = load_images(tmp_path, size=8)
    with pytest.raises(UserError, match=r"cut\.png"):
        source.batch([0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"text": "a"}', "line 1: needs file_name"),
        ('{"file_name": "good.png"}', "one of prompt, caption, text"),
        ('{"file_name": "gone.png", "text": "a"}', "does not exist"),
    ],
)
def test_a_malformed_metadata_line_is_named(tmp_path, line, message):
    add(tmp_path, "good.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        load_images(tmp_path, size=8)


def test_a_missing_folder_or_size_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_images(tmp_path / "nowhere", size=8)
    with pytest.raises(UserError, match="size"):
        load_images(tmp_path)


def test_every_epoch_of_a_folder_plays_each_image_once(tmp_path):
    for number in range(5):
        add(tmp_path, f"{number}.png")
    source = load_images(tmp_path, size=8)
    assert sorted(source.indices(0, 5, 5)) == [0, 1, 2, 3, 4]
    assert source.indices(0, 7, 3) == source.indices(0, 5, 5)[2:]


def test_the_fingerprint_changes_with_captions_files_and_size(tmp_path):
    def prints() -> str:
        return load_images(tmp_path, size=8).fingerprint

    add(tmp_path, "a.png")
    first = prints()
    assert first == prints()
    (tmp_path / "a.txt").write_text("other words")
    second = prints()
    add(tmp_path, "b.png")
    assert len({first, second, prints(), load_images(tmp_path, size=9).fingerprint}) == 4
    assert load_images("shapes", seed=1).fingerprint != load_images("shapes", seed=2).fingerprint
