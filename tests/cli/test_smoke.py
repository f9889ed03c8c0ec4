"""`--smoke`: which tiny teacher stands for a teacher, what stays of a recipe, and that it runs to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stepdistill import cli
from stepdistill.errors import UserError
from stepdistill.recipe import Recipe
from stepdistill.smoke import family_of, smoke_recipe


def recipe_of(**changes: Any) -> Recipe:
    stage = {
        "objective": {"name": "dmd2", "guidance": 5.0, "gan_weight": 0.005},
        "steps": 20000, "batch_size": 64, "accumulate": 8,
        "checkpointing": True, "starts": {"student": "stabilityai/sd-turbo", "critic": "teacher"},
        "players": {"default": {"schedule": "constant_with_warmup", "warmup_steps": 500, "clip": 7.0},
                    "student": {"weights": {"lora": {"rank": 64}}}},
    }  # fmt: skip
    content = {"name": "real", "teacher": "stabilityai/stable-diffusion-xl-base-1.0", "stages": [stage],
               "data": {"prompts": "nowhere.txt", "images": "nowhere", "size": 1024},
               "teacher_loras": [{"path": "some/lora"}], "bench": {"prompts": 8}}  # fmt: skip
    return Recipe.from_mapping({**content, **changes})


@pytest.mark.parametrize(
    ("teacher", "family"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd"),
        ("Lykon/dreamshaper-7", "sd"),
        ("stabilityai/stable-diffusion-2-1", "sd21"),
        ("stabilityai/stable-diffusion-2-1-base", "sd"),
        ("stabilityai/sd-turbo", "sd"),
        ("stabilityai/sdxl-turbo", "sdxl"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3"),
        ("facebook/DiT-XL-2-256", "dit"),
        ("PixArt-alpha/PixArt-XL-2-512x512", "pixart"),
        ("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", "pixart_sigma"),
        ("tiny:sd3", "sd3"),
    ],
)
def test_the_family_of_a_well_known_teacher_is_known_without_a_download(teacher: str, family: str) -> None:
    assert family_of(recipe_of(teacher=teacher)) == family


def test_files_on_this_machine_say_more_than_names(sd_folder: str, tmp_path: Path) -> None:
    named = tmp_path / "sdxl"
    named.symlink_to(sd_folder)
    assert family_of(recipe_of(teacher=str(named))) == "sd"
    v = tmp_path / "v"
    (v / "scheduler").mkdir(parents=True)
    (v / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (v / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert family_of(recipe_of(teacher=str(v))) == "sd21"


def test_the_small_recipe_is_for_the_kind_of_its_teacher(tmp_path_factory: pytest.TempPathFactory) -> None:
    noise, flow = (smoke_recipe(Recipe.load("quickstart", [f"teacher=tiny:{name}"]), tmp_path_factory.mktemp(name))
                   for name in ("sd", "sd3"))  # fmt: skip
    assert noise.data.make_pairs == {**flow.data.make_pairs, "sampler": "dpm++"}
    assert flow.data.make_pairs["sampler"] == "euler"
    assert [s.objective.options.get("timestep") for s in (noise.stages[0], flow.stages[0])] == [549, 999]
    assert [list(s.objective.options["timesteps"]) for s in (noise.stages[1], flow.stages[1])] == [[549], [999]]


def test_an_unknown_teacher_is_asked_about() -> None:
    with pytest.raises(UserError, match=r"teacher someone/thing is not known; .*teacher=tiny:NAME, of sd, .*sdxl"):
        family_of(recipe_of(teacher="someone/thing"))


def test_a_broken_file_of_the_teacher_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(UserError, match=r"--smoke: .*model_index\.json is damaged .*; copy or download it again"):
        family_of(recipe_of(teacher=str(tmp_path)))


@pytest.mark.parametrize("words", [["--fresh"], ["--resume"], ["--shard"], ["--num-processes", "2"]])
def test_what_a_trial_would_ignore_is_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(recipe_of().to_yaml())
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "x.yaml"), "--smoke", *words])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{words[0]} does nothing with --smoke")


def test_the_method_stays_and_its_size_goes(tmp_path: Path) -> None:
    recipe = recipe_of()
    small = smoke_recipe(recipe, tmp_path)
    assert (small.teacher, small.teacher_loras, small.bench) == ("tiny:sdxl", (), None)
    assert Path(small.output).is_relative_to(tmp_path)
    before, after = recipe.stages[0], small.stages[0]
    assert after.objective == before.objective
    assert (after.steps, after.batch_size, after.accumulate) == (2, 2, 2)
    assert after.starts == {"student": "teacher", "critic": "teacher"}
    assert after.checkpointing
    assert after.player("student").lora == before.player("student").lora
    assert after.player("student").clip == 7.0
    assert small.export.pipeline
    assert len(list((tmp_path / "images").glob("*.png"))) == len((tmp_path / "prompts.txt").read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["tiny:sdxl", "tiny:dit"])
def test_a_recipe_runs_to_its_end_and_leaves_nothing_behind(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(device="cpu").to_yaml())
    result = CliRunner().invoke(cli.app, ["train", str(file), f"teacher={teacher}", "--smoke"])
    assert result.exit_code == 0, result.output
    assert f"works from its beginning to its end, on {teacher}" in result.output
    assert not list((tmp_path / "temporary").glob("stepdistill-smoke-*"))
    assert not (tmp_path / "runs").exists()
