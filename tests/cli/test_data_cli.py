"""`stepdistill data pairs`: what it takes from a recipe, what it prints, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepdistill import cli_data
from stepdistill.data.pairs import load_pairs
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.recipe import Recipe
from stepdistill.recipe_text import dump_yaml
from stepdistill.resources.apply import loading_types
from tests.cli.test_cli import call
from tests.tiny import PROMPTS, tiny_recipe


def recipe_file(folder: Path, teacher: str, **data: Any) -> Path:
    content = tiny_recipe(teacher, folder / "run", seed=5)
    content["data"].update({"count": 3, **data})
    file = folder / "x.yaml"
    file.write_text(dump_yaml(content))
    return file


def test_a_recipe_says_what_can_be_taken_from_it_and_options_win(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "some/teacher", pairs="where/they/go", size=32)
    file.write_text(file.read_text() + "bench: {teacher_steps: 11, teacher_guidance: 2.5}\nprecision: bf16\n")
    job = cli_data._pair_job(str(file), ["steps=20", "sampler=dpm++", "states=[949, 499]"], None)
    assert (job.teacher, job.folder, job.device) == ("some/teacher", Path("where/they/go"), "cpu")
    assert job.prompts.prompts == PROMPTS[:3]
    settings = job.settings
    assert (settings.steps, settings.guidance, settings.sampler, settings.states) == (20, 2.5, "dpm++", (949, 499))
    assert (settings.seed, settings.size, settings.precision, settings.count) == (5, 32, "bf16", None)


def test_a_recipe_without_a_benchmark_leaves_steps_and_guidance_to_the_defaults(tmp_path: Path) -> None:
    job = cli_data._pair_job(str(recipe_file(tmp_path, "some/teacher")), [], None)
    assert (job.settings.steps, job.settings.guidance, job.folder) == (50, 3.0, Path("pairs"))


def test_a_bundled_recipe_is_found_by_its_name_and_anything_else_is_a_teacher() -> None:
    assert cli_data._pair_job("shapes/dmd_1step", [], None).teacher == "assets/shapes/teacher"
    job = cli_data._pair_job("owner/name", ["count=4"], "shapes")
    assert (job.teacher, len(job.prompts), job.device) == ("owner/name", 4, "auto")


def test_a_file_of_prompts_is_taken_whole_whatever_the_count(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    job = cli_data._pair_job("owner/name", ["count=4"], str(tmp_path / "prompts.txt"))
    assert (job.prompts.prompts, job.settings.count) == (PROMPTS, 4)


@pytest.mark.parametrize(
    ("options", "prompts", "said"),
    [
        (["stepz=3"], "shapes", "pairs.stepz: unknown key; did you mean 'steps'"),
        (["steps=many"], "shapes", "pairs.steps: expected an integer, got 'many'"),
        (["steps"], "shapes", "'steps' is not key=value, for example count=4096"),
        (["steps=0"], "shapes", "steps must be at least 1, got 0"),
        ([], None, "--prompts is missing"),
        ([], "shapes", "say how many"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(options: list[str], prompts: str | None, said: str) -> None:
    with pytest.raises(UserError) as caught:
        cli_data._pair_job("owner/name", options, prompts)
    assert said in str(caught.value)


def test_the_command_makes_pairs_and_prints_their_folder(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    words = ["data", "pairs", recipe_file(tmp_path, sd_folder, pairs=str(folder)), "steps=2"]
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(folder)
    assert "DDIMScheduler, 2 steps, guidance 3, seed 5" in " ".join(out.split())
    assert len(load_pairs(folder)) == 3

    assert call(monkeypatch, *words, "guidance=4.0", "--quiet") == 2
    assert "guidance: 3.0 there, 4.0 here" in capsys.readouterr().err
    assert call(monkeypatch, *words, "guidance=4.0", "--quiet", "--fresh") == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert load_pairs(folder).facts["guidance"] == 4.0


def test_pairs_fit_the_run_whose_teacher_is_kept_in_bfloat16(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(tmp_path, sd_folder, pairs=str(tmp_path / "made"))
    file.write_text(file.read_text() + "memory: {base: bf16}\nprecision: bf16\n")
    assert call(monkeypatch, "data", "pairs", file, "steps=2", "--quiet") == 0
    family = load_family(sd_folder, dtype=loading_types(Recipe.load(file).memory))  # as the run has it
    assert len(load_pairs(tmp_path / "made", family)) == 3


def test_ctrl_c_says_what_is_left(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepdistill.data.pair_maker.make_pairs", interrupted)
    assert call(monkeypatch, "data", "pairs", recipe_file(tmp_path, sd_folder)) == 130
    assert "interrupted: whole shards left at pairs; the same command goes on" in capsys.readouterr().err
