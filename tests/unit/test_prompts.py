from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepdistill.data.prompts import epoch_indices, load_prompts
from stepdistill.data.shapes import captioned_scene
from stepdistill.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_shapes_prompts_are_the_captions_of_the_seeded_scenes():
    prompts = load_prompts("shapes", count=20, seed=5)
    assert prompts.prompts == tuple(captioned_scene(5, i).caption for i in range(20))
    assert load_prompts("shapes", count=20, seed=6).prompts != prompts.prompts


def test_endless_shapes_prompts_need_a_count():
    with pytest.raises(UserError, match="count"):
        load_prompts("shapes")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\n  a dog \n"),
        ("p.txt", "\ufeffa cat\r\na dog"),
        ("p.json", '["a cat", "a dog"]'),
        ("p.json", '[{"caption": "a cat"}, {"text": "a dog"}]'),
        ("p.jsonl", '{"prompt": "a cat"}\n"a dog"\n'),
        ("p.csv", 'id,caption\n1,a cat\n2,"a dog"\n'),
    ],
)
def test_every_file_format_gives_the_same_prompts(tmp_path, name, content):
    prompts = load_prompts(write(tmp_path / name, content))
    assert prompts.prompts == ("a cat", "a dog")
    assert prompts.batch([1, 0, 1]) == ["a dog", "a cat", "a dog"]


def test_blank_entries_are_left_out_and_counted(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.txt", "a cat\n\n   \na dog\n"))
    assert prompts.prompts == ("a cat", "a dog")
    assert prompts.dropped == {"blank": 2}
    assert "2 blank" in prompts.summary()
    csv = load_prompts(write(tmp_path / "p.csv", 'text\na cat\n" "\n'))
    assert (csv.prompts, csv.dropped) == (("a cat",), {"blank": 1})


def test_a_prompt_with_a_comma_or_a_line_break_survives_csv(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.csv", 'prompt,n\n"a cat, red",1\n"two\nlines",2\n'))
    assert prompts.prompts == ("a cat, red", "two\nlines")


def test_count_takes_the_first_prompts_and_a_short_file_gives_all(tmp_path):
    file = write(tmp_path / "p.txt", "a\nb\nc\n")
    assert load_prompts(file, count=2).prompts == ("a", "b")
    assert load_prompts(file, count=99).prompts == ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"a cat\nx\0y", r"p\.txt, line 2: binary"),
        ("p.txt", b"a cat\na dog\nz\xff\n", r"p\.txt, line 3: not UTF-8"),
        ("p.json", b'{"prompt": "a cat"}', "must hold a list"),
        ("p.json", b'["a cat", 3]', r"line 2: a prompt must be text, got int"),
        ("p.jsonl", b'"a cat"\n{"prompt": \n', r"p\.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b'{"url": "x"}\n', "line 1: none of the keys prompt, caption, text; found url"),
        ("p.csv", b"id,words\n1,a cat\n", "none of the keys prompt, caption, text; found id, words"),
        ("p.arrow", b"ARROW1", "ending in .txt"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path):
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is a folder"):
        load_prompts(tmp_path / "d.txt")


def test_the_fingerprint_changes_with_any_prompt_their_order_and_their_borders(tmp_path):
    def of(prompts: list[str]) -> str:
        return load_prompts(write(tmp_path / "p.json", json.dumps(prompts))).fingerprint

    assert of(["a", "b"]) == of(["a", "b"])
    assert len({of(["a", "b"]), of(["b", "a"]), of(["a", "c"]), of(["a b"]), of(["a", "b", "b"])}) == 5


def test_every_epoch_plays_each_item_once_in_an_order_of_its_own():
    size = 50
    epochs = [epoch_indices(3, start, size, size) for start in (0, size, 2 * size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(size))
    assert epoch_indices(4, 0, size, size) != epochs[0]


def test_the_order_depends_on_the_sample_number_alone_so_a_resumed_run_goes_on_exactly():
    whole = epoch_indices(7, 0, 100, 13)
    pieces = [i for start in range(0, 100, 5) for i in epoch_indices(7, start, 5, 13)]
    assert pieces == whole
    assert epoch_indices(7, 91, 3, 13) == whole[91:94]


def test_an_order_over_nothing_is_refused():
    with pytest.raises(ValueError, match="size"):
        epoch_indices(0, 0, 1, 0)
