"""Sources of prompts and images beside plain files: options, patterns, tables, webdataset shards, data sets."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stepdistill.data import shapes
from stepdistill.data.check import check_images, check_prompts
from stepdistill.data.hub import WINDOW, HubImages
from stepdistill.data.images import load_images
from stepdistill.data.prompts import load_prompts
from stepdistill.data.source import parse_source
from stepdistill.errors import UserError


def picture(color: Any = "red", size: tuple[int, int] = (12, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "png")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            told = tarfile.TarInfo(name)
            told.size = len(content)
            tar.addfile(told, io.BytesIO(content))
    return path


@pytest.mark.parametrize("objects", [1, 2])
def test_the_bundled_scenes_can_all_have_so_many_objects(objects: int) -> None:
    text = f"shapes?objects={objects}"
    scenes = [shapes.captioned_scene(1, index, objects=objects) for index in range(40)]
    assert {len(scene.scene.objects) for scene in scenes} == {objects}
    captions = [scene.caption for scene in scenes]
    assert load_images(text).texts(range(40)) == captions
    assert load_prompts(text, count=40).prompts == tuple(captions)
    assert len({load_images(each).fingerprint for each in ("shapes", text)}) == 2


def test_a_number_of_objects_that_no_scene_has_is_refused() -> None:
    with pytest.raises(UserError, match="a scene has 1 or 2 objects, not 3"):
        parse_source("shapes?objects=3")
    with pytest.raises(UserError, match="unknown option 'object'"):
        parse_source("shapes?object=2")


def test_options_stand_behind_a_question_mark_and_unknown_ones_are_refused() -> None:
    source = parse_source("hf:owner/name?split=test&prompt=words")
    assert (source.place, source.options) == ("hf:owner/name", {"split": "test", "prompt": "words"})
    assert parse_source("what is this?.txt").place == "what is this?.txt"
    with pytest.raises(UserError, match="unknown option 'promt'; did you mean 'prompt'"):
        parse_source("a.csv?promt=x")
    with pytest.raises(UserError, match="unknown option 'split'"):
        parse_source("a.csv?split=train")


def test_a_key_of_any_name_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "TEXT": "y"}\n')
    assert load_prompts(f"{tmp_path}/a.jsonl?prompt=TEXT").prompts == ("y",)
    with pytest.raises(UserError, match="none of the keys title; found prompt, TEXT"):
        load_prompts(f"{tmp_path}/a.jsonl?prompt=title")


def test_patterns_and_ranges_name_several_files_in_order(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        (tmp_path / f"p-{number:02d}.txt").write_text(f"{number}\n")
    assert load_prompts(f"{tmp_path}/p-*.txt").prompts == ("8", "9", "10")
    assert load_prompts(f"{tmp_path}/p-{{09..10}}.txt").prompts == ("9", "10")
    with pytest.raises(UserError, match="no file has such a name"):
        load_prompts(f"{tmp_path}/q-*.txt")
    with pytest.raises(UserError, match=r"p-11\.txt: cannot be read"):
        load_prompts(f"{tmp_path}/p-{{10..11}}.txt")
    with pytest.raises(UserError, match="counts down"):
        load_prompts(f"{tmp_path}/p-{{2..1}}.txt")


def test_parquet_reads_the_text_column_alone(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": [1, 2, 3], "caption": ["a cat", None, " a dog "]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    prompts = load_prompts(tmp_path / "a.parquet")
    assert (prompts.prompts, prompts.dropped) == (("a cat", "a dog"), {"blank": 1})
    with pytest.raises(UserError, match="none of the keys prompt, caption, text; found id"):
        parquet.write_table(table.select(["id"]), tmp_path / "b.parquet")
        load_prompts(tmp_path / "b.parquet")


@pytest.mark.parametrize(("library", "source"), [("pyarrow.parquet", "a.parquet"), ("datasets", "hf:owner/name")])
def test_a_library_that_is_missing_is_named_with_the_extra(
    library: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library}, which is not installed: pip install 'stepdistill\[data\]'"):
        load_prompts(source)


def test_shards_give_images_and_captions_of_every_usual_form(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {
        "a/x.png": picture("red"), "a/x.txt": b" a  red\nsquare ",
        "a/y.json": json.dumps({"caption": "told", "other": 1}).encode(), "a/y.jpg": picture("lime"),
    })  # fmt: skip
    shard(tmp_path / "1.tar", {"z.png": picture("blue"), "z.caption": b"blue"})
    images = load_images(f"{tmp_path}/{{0..1}}.tar", size=8)
    read, captions = images.batch([2, 0, 1])
    assert captions == ["blue", "a red square", "told"]
    assert torch.equal(read[:, :, 4, 4], torch.tensor([[-1.0, -1, 1], [1, -1, -1], [-1, 1, -1]]))
    assert load_images(tmp_path, size=8).texts([0, 1, 2]) == images.texts([0, 1, 2])
    assert load_prompts(tmp_path / "0.tar").prompts == ("a  red\nsquare", "told")
    assert sorted(images.indices(0, 3, 3)) == [0, 1, 2]


def test_a_sample_without_a_caption_or_image_is_counted_and_what_it_has_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {
        "a.png": picture(), "a.txt": b"good", "b.png": picture(), "b.json": b'{"url": "x"}', "c.txt": b"text alone",
        "d.png": picture(size=(12, 4)), "d.txt": b"small",
    })  # fmt: skip
    images = load_images(path, size=8)
    assert images.texts(range(images.length or 0)) == ["good"]
    checked = check_images(str(path), 8)
    assert checked.kept == 1
    assert checked.is_fine
    told = "\n".join(checked.lines())
    assert f"1 without a caption, first {path}: b.png has png, json" in told
    assert f"1 without an image, first {path}: sample c has txt" in told
    assert f"1 smaller than 8 pixels, first {path}: d.png (12x4)" in told


def test_shards_of_which_nothing_can_be_used_say_why(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {"a.png": picture(), "b.png": picture()})
    with pytest.raises(UserError, match=r"none of 2 images can be used \(2 without a caption, first .*a\.png has png"):
        load_images(path, size=8)


def test_compressed_and_missing_shards_are_refused_with_a_remedy(tmp_path: Path) -> None:
    packed = shard(tmp_path / "0.tar.gz", {"a.png": picture(), "a.txt": b"a"}, "w:gz")
    with pytest.raises(UserError, match="unpack compressed shards"):
        load_images(packed, size=8)
    with pytest.raises(UserError, match="there is no such shard"):
        load_images(tmp_path / "1.tar", size=8)


def test_a_copy_of_a_shard_has_the_same_fingerprint_and_another_image_another(tmp_path: Path) -> None:
    def prints(folder: str, color: str) -> str:
        path = shard(tmp_path / folder / "0.tar", {"a.png": picture(color), "a.txt": b"a"})
        return load_images(path, size=8).fingerprint

    assert prints("a", "red") == prints("b", "red")
    assert prints("c", "blue") != prints("a", "red")


class Numbered:
    """Rows 0, 1, 2 ...; every fifth has no caption. Remembers what it was asked for."""

    def __init__(self, length: int, anywhere: bool) -> None:
        self.length, self.anywhere = length, anywhere
        self.asked: list[tuple[int, int]] = []

    def window(self, first: int, count: int) -> list[dict[str, Any]]:
        self.asked.append((first, count))
        image = {"bytes": picture(), "path": None}
        return [{"image": image, "text": "" if n % 5 == 4 else str(n)}
                for n in range(first, min(first + count, self.length))]  # fmt: skip


def streamed(length: int, anywhere: bool = False, actual: int | None = None) -> tuple[HubImages, Numbered]:
    rows = Numbered(actual or length, anywhere)
    return HubImages(parse_source("hf:x"), rows, 8, length), rows  # type: ignore[arg-type]


def played(images: HubImages, start: int, count: int) -> list[str]:
    return images.texts(images.indices(3, start, count))


def test_a_stream_plays_every_good_row_in_every_epoch_in_an_order_of_its_own() -> None:
    length = 2 * WINDOW + 40
    images, _ = streamed(length)
    first, second = played(images, 0, length), played(images, length, length)
    good = {str(n) for n in range(length) if n % 5 != 4}
    assert set(first) == set(second) == good
    assert first != second
    assert {int(text) // WINDOW for text in first[:WINDOW]} == {0}, "windows follow each other, as a stream must"
    assert first[:WINDOW] != sorted(first[:WINDOW], key=int)


def test_a_stream_that_is_resumed_anywhere_goes_on_with_the_same_rows() -> None:
    length = 2 * WINDOW + 40
    images, _ = streamed(length)
    straight = [text for start in range(0, length + 60, 4) for text in played(images, start, 4)]
    for start in (4, WINDOW, length - 4, length + 8):
        resumed, rows = streamed(length)
        assert played(resumed, start, 8) == straight[start : start + 8]
        assert rows.asked[0][0] == start % length // WINDOW * WINDOW, "what was before is not read"


def test_rows_that_can_be_read_anywhere_are_shuffled_over_all() -> None:
    images, _ = streamed(50, anywhere=True)
    first = played(images, 0, 50)
    assert {text for text in first if text} == {str(n) for n in range(50) if n % 5 != 4}
    read, captions = images.batch([4, 7])
    assert captions == ["5", "7"], "row 4 has no caption, the next one stands in for it"
    assert read.shape == (2, 3, 8, 8)


def test_a_stream_that_ends_early_says_where() -> None:
    images, _ = streamed(30, actual=20)
    with pytest.raises(UserError, match=r"ends after 20 rows, and 30 were to be played; set data\.count=20"):
        played(images, 0, 1)


def test_a_data_set_on_disk_is_read_streamed_and_at_any_place(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = [json.dumps({"caption": f"text {n}", "n": n}) for n in range(7)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    wanted = tuple(f"text {n}" for n in range(7))
    assert load_prompts(f"hf:{tmp_path}").prompts == wanted
    assert load_prompts(f"hf:{tmp_path}", count=3).prompts == wanted[:3]
    with pytest.raises(UserError, match="cannot be opened"):
        load_prompts(f"hf:{tmp_path}?split=test")


def test_a_check_counts_every_fault_at_which_a_training_stops(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"url": 1}\n\n{"text": 3}\n{"prompt"\n{"prompt": "a cat"}\n{"id": 2}\n')
    with pytest.raises(UserError, match="line 2: none of the keys"):
        load_prompts(file)
    checked = check_prompts(str(file))
    assert (checked.kept, checked.is_fine) == (2, False)
    assert checked.findings.dropped == {
        "without a prompt": 2, "blank": 1, "whose prompt is no text": 1, "not valid JSON": 1,
    }  # fmt: skip
    told = "\n".join(checked.lines())
    assert "2 without a prompt, first " in told
    assert "line 2: none of the keys prompt, caption, text; found url; a training stops here" in told
    assert "1 blank, first" in told
    assert "1 of them are repeated" in told


def test_a_check_finds_damaged_images_by_header_and_cut_off_ones_by_their_pixels(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "a.png").write_bytes(b"none")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:900])
    quick, thorough = (check_images(str(tmp_path), 8, pixels=pixels) for pixels in (False, True))
    assert (quick.kept, thorough.kept) == (2, 1)
    assert quick.findings.dropped == {"unreadable": 1}
    assert thorough.findings.dropped == {"unreadable": 1, "whose pixels cannot be read": 1}
    assert not quick.is_fine


def test_a_check_of_nothing_usable_gives_the_reason_and_no_exception(tmp_path: Path) -> None:
    checked = [check_images(str(tmp_path), 8), check_prompts(str(tmp_path / "none.txt"))]
    assert [c.is_fine for c in checked] == [False, False]
    assert "none of 0 images" in checked[0].lines()[-1]
    assert "cannot be read" in checked[1].lines()[-1]
