"""`stepdistill data check` and `data cache`: from a recipe to a cache, and to a run that trains from it alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stepdistill.data.latents import LatentCache
from stepdistill.families.sd import StableDiffusion
from stepdistill.recipe import Recipe
from stepdistill.recipe_text import dump_yaml
from stepdistill.run import train
from stepdistill.run_folder import RunFolder
from tests.cli.test_cli import call
from tests.tiny import tiny_recipe


def recipe_file(folder: Path, teacher: str, **data: Any) -> Path:
    """A recipe of two stages, of which one plays prompts and one plays images."""
    (folder / "images").mkdir()
    for number, size in enumerate([(20, 20), (20, 20), (40, 20), (20, 44), (5, 5)]):
        Image.new("RGB", size, (50 * number, 0, 0)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("abcde"[number])
    content = tiny_recipe(teacher, folder / "run")
    (stage,) = content["stages"]
    content["stages"] = [{**stage, "steps": 2}, {**stage, "objective": {"name": "denoising"}, "steps": 3}]
    content["data"].update({"count": 6, "images": str(folder / "images"), "size": 16, **data})
    file = folder / "x.yaml"
    file.write_text(dump_yaml(content))
    return file


def test_a_run_trains_from_a_prepared_cache_and_encodes_no_prompt_of_its_own(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(tmp_path, sd_folder, buckets=["16x16", "24x12", "12x24"])
    folder = tmp_path / "cached"
    assert call(monkeypatch, "data", "cache", file, "--output", folder, "--quiet") == 0
    assert capsys.readouterr().out == f"{folder}\n"
    made = sorted(path.relative_to(folder).parts[0] for path in folder.glob("*/*/shard-*.safetensors"))
    assert made == ["conditions", "latents"]

    encoded: list[str] = []
    encode = StableDiffusion.encode_prompts

    def counting(self: StableDiffusion, prompts: Any) -> Any:
        encoded.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(StableDiffusion, "encode_prompts", counting)
    train(Recipe.load(file, [f"data.cache_folder={folder}"]))
    assert set(encoded) <= {""}
    assert not list((tmp_path / "run" / "cache").glob("**/*.safetensors"))
    assert '"student/gradient_norm"' in (tmp_path / "run" / "metrics.jsonl").read_text()

    assert call(monkeypatch, "train", file, f"data.cache_folder={folder}", "data.size=32", "--fresh", "--quiet") == 2
    assert "size: 16 there, 32 here" in capsys.readouterr().err


def by_letter(prompt: str) -> int:
    """Students 0 and 1 in turns: of the pictures a to d, each has two."""
    return ord(prompt[0]) % 2


@pytest.mark.slow
def test_each_of_several_students_plays_its_share_of_a_cache_that_was_prepared_for_all(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(tmp_path, sd_folder, buckets=["16x16", "24x12", "12x24"])
    rule = "multi_student={students: 2, by: 'tests.cli.test_datasets_cli:by_letter', part: 1}"
    folder = tmp_path / "cached"
    assert call(monkeypatch, "data", "cache", file, "--output", folder, "--quiet") == 0
    captions: list[str] = []
    batch = LatentCache.batch

    def noting(self: LatentCache, *args: Any, **options: Any) -> Any:
        found = batch(self, *args, **options)
        captions.extend(found.captions)
        return found

    monkeypatch.setattr(LatentCache, "batch", noting)
    weights, played = [], []
    for name, options in (("own", []), ("shared", [f"data.cache_folder={folder}"])):
        run = tmp_path / name
        train(Recipe.load(file, [rule, f"output={run}", *options]))
        weights.append(RunFolder(run).load_roles(1)["student"].tensors)
        played.append(list(captions))
        captions.clear()
    assert set(played[1]) == {"a", "c"}
    assert played[0] == played[1]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-6)


def test_where_a_cache_lies_and_how_many_threads_read_are_not_part_of_what_is_computed(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "some/teacher")
    plain, moved, other = (
        Recipe.load(file, overrides).sha256
        for overrides in ([], ["data.cache_folder=x", "data.workers=4"], ["data.buckets=auto"])
    )
    assert plain == moved
    assert plain != other


def test_a_check_of_a_recipe_counts_what_is_left_out_and_says_how_buckets_are_filled(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(tmp_path, sd_folder)
    assert call(monkeypatch, "data", "check", file, "data.buckets=[16x16, 24x12, 12x24]") == 0
    out = capsys.readouterr().out
    assert "6 can be used" in out
    assert "4 can be used" in out
    assert "16x16: 2" in out
    assert "24x12: 1" in out
    assert "1 smaller than their bucket, first" in out


def test_a_check_reads_the_teachers_configuration_and_no_weights(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(sd_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = recipe_file(tmp_path, str(bare), size=None)
    assert call(monkeypatch, "data", "check", file) == 0
    assert "1 smaller than 16 pixels" in capsys.readouterr().out, "the teacher's own size"
    assert call(monkeypatch, "data", "check", file, "data.buckets=[16x15]") == 2
    assert "both sides have to be multiples of 2 pixels" in capsys.readouterr().err


def test_a_check_of_a_source_exits_with_one_where_a_training_would_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n{"words": "b"}\n')
    assert call(monkeypatch, "data", "check", file) == 1
    assert "none of the keys prompt, caption, text; found words; a training stops here" in capsys.readouterr().out
    assert call(monkeypatch, "data", "check", f"{file}?prompt=prompt", "--as", "pictures") == 2
    assert call(monkeypatch, "data", "check", file, "seed=1") == 2
    assert "only recipes have keys" in capsys.readouterr().err
    assert call(monkeypatch, "data", "check", tmp_path, "--size", "8") == 1
    assert "none of 0 images" in capsys.readouterr().out
