"""Recipes for real checkpoints: all are there, with the published numbers, and say whose each number is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stepdistill.recipe import Recipe, bundled_recipes
from stepdistill.small_options import small_objective, small_pairs


ROOT = Path(__file__).resolve().parents[2]
PROMISED = {
    "sd15/agd", "sd15/dmd2_1step", "sd15/hyper_tscd", "sd15/lcm_lora", "sd15/sid_1step", "sd15/swiftbrush_1step",
    "sd21/snoopi_1step", "sd21/swiftbrush_1step", "sdxl/agd", "sdxl/dmd2_1step", "sdxl/dmd2_4step",
    "sdxl/dmd2_4step_lora", "sdxl/hyper_tscd", "sdxl/lcm_lora", "sdxl/lightning_4step", "pixart/pg_sb_1step",
    "sd3/dmd2_4step_lora", "sd3/pcm_4step_lora", "flux/dmd2_4step_lora", "flux/pcm_4step_lora", "sana/sprint_4step",
    "dit/agd", "dit/dmd2_1step", "dit/multi_student_1step",
}  # fmt: skip
FOLDERS = {name.partition("/")[0] for name in PROMISED}
REAL = sorted(name for name in bundled_recipes() if name.partition("/")[0] in FOLDERS)
# Samples of one update of the student, in the recipe's stages: on one process, micro-batches times their size.
SAMPLES = {
    "sd15/agd": (64,), "sd15/dmd2_1step": (2048, 2048), "sd15/hyper_tscd": (512,) * 4, "sd15/lcm_lora": (12,),
    "sd15/sid_1step": (512,), "sd15/swiftbrush_1step": (64,), "sd21/snoopi_1step": (64,),
    "sd21/swiftbrush_1step": (64,), "sdxl/agd": (64,), "sdxl/dmd2_1step": (256, 128), "sdxl/dmd2_4step": (128,),
    "sdxl/dmd2_4step_lora": (128,), "sdxl/hyper_tscd": (512,) * 4, "sdxl/lcm_lora": (12,),
    "sdxl/lightning_4step": (512,) * 3, "pixart/pg_sb_1step": (32,), "sd3/dmd2_4step_lora": (128,),
    "sd3/pcm_4step_lora": (16,), "flux/dmd2_4step_lora": (128,), "flux/pcm_4step_lora": (16,),
    "sana/sprint_4step": (512,), "dit/agd": (64,), "dit/dmd2_1step": (280, 280), "dit/multi_student_1step": (70, 70),
}  # fmt: skip
# Of one stage: updates of the student, the student's rate, and options of the objective, as they are published.
PUBLISHED: list[tuple[str, int, int, float, dict[str, Any]]] = [
    ("sd15/dmd2_1step", 0, 39_000 // 10, 1e-5, {"guidance": 1.75, "critic_updates": 10, "timesteps": [999]}),
    ("sd15/dmd2_1step", 1, 2_000 // 10, 5e-7, {"guidance": 1.75, "gan_weight": 1e-3, "discriminator_weight": 1e-2}),
    ("sdxl/dmd2_4step", 0, 19_000 // 5, 5e-7, {"guidance": 8, "gan_weight": 5e-3, "timesteps": [999, 749, 499, 249]}),
    ("sdxl/dmd2_4step_lora", 0, 16_000 // 5, 5e-5, {"guidance": 8, "gan_weight": 5e-3, "critic_updates": 5}),
    ("sdxl/dmd2_1step", 0, 2_000, 1e-5, {"timestep": 399, "distance": "lpips"}),
    ("sdxl/dmd2_1step", 1, 24_000 // 5, 5e-7, {"guidance": 8, "timesteps": [399]}),
    ("sd15/swiftbrush_1step", 0, 65_000, 1e-6, {"guidance": 4.5, "condition_dropout": 0.1, "guide_critic": True}),
    ("sd21/swiftbrush_1step", 0, 65_000, 1e-6, {"guidance": 4.5, "t_min": 0.02, "t_max": 0.98}),
    ("sd21/snoopi_1step", 0, 40_000, 1e-6, {}),
    ("pixart/pg_sb_1step", 0, 50_000, 1e-6, {"guidance": [0.5, 3.0]}),
    ("sd15/lcm_lora", 0, 1_000, 1e-4, {"guidance": [6, 16], "solver_steps": 50, "distance": "huber", "huber_c": 1e-3}),
    ("sdxl/lcm_lora", 0, 1_000, 1e-4, {"guidance": [4, 16], "target_decay": 0.0}),
    ("sdxl/hyper_tscd", 3, 1_000, 1e-6, {"segments": 1}),
    ("sdxl/lightning_4step", 0, 2_000, 1e-5, {"guidance": 6, "halvings": 2}),
    ("sdxl/lightning_4step", 1, 2_000, 5e-7, {"teacher_steps": 4}),
    ("sd15/sid_1step", 0, 20_000, 1e-6, {"timesteps": [625], "alpha": 1, "guidance": 1.5, "t_max": 0.979}),
    ("sd15/agd", 0, 5_000, 1e-4, {"width": 320}),
    ("dit/agd", 0, 5_000, 1e-4, {"width": 256}),
    ("sd3/pcm_4step_lora", 0, 20_000, 5e-6, {"guidance": 4, "solver_steps": 100, "gan_weight": 0.1}),
    ("sana/sprint_4step", 0, 20_000, 2e-6, {"gan_weight": 0.5, "time_std": 1.6, "gan_time_mean": -0.6,
                                            "largest_time_share": 0.5, "warmup_steps": 4_000}),
    ("dit/dmd2_1step", 0, 410_000 // 5, 2e-6, {"critic_updates": 5}),
    ("dit/dmd2_1step", 1, 140_000 // 5, 5e-7, {"gan_weight": 3e-3}),
]  # fmt: skip
# What sets nothing: comments and blank lines, keys of whole parts, users of anchors, and the names of the user's own.
NOTHING = re.compile(
    r"#|$|(name: [\w-]+-[\w-]+|output: .*|seed: 0|device: auto|teacher: .*|(objective|players): &\w+|\w+:|\w+: \*\w+"
    r"|<<: \*\w+|name: sum|timesteps: \[|\])$"
)
SOURCE = re.compile(r"([A-Z][\w.&-]*(?: v2)?) \(arXiv:\d{4}\.\d{4,5}\)")


def unsourced(text: str) -> list[str]:
    """The lines of a recipe that set something and do not say by whose example, ours or a named paper's."""
    names = {"ours", "yours", *SOURCE.findall(text)}
    found = []
    for line in text.splitlines():
        setting, _, comment = line.partition("  # ")
        named = any(re.match(rf"{re.escape(name)}(?! v\d)\b", comment) for name in names)
        if not named and (comment or not NOTHING.match(setting.strip().removeprefix("- "))):
            found.append(line)
    return found


def options_at(recipe: Recipe, stage: int) -> dict[str, Any]:
    return recipe.model_dump(mode="json")["stages"][stage]["objective"]


def test_every_promised_recipe_is_shipped_and_listed_with_what_it_makes() -> None:
    assert set(REAL) == PROMISED == set(SAMPLES)
    page = (ROOT / "docs/checkpoints.md").read_text()
    rows = re.findall(r"^\| \[([\w/]+)\]\(\.\./recipes/([\w/]+)\.yaml\) \| ([^|]+) \| (\d+) \|", page, re.M)
    assert sorted(name for name, *_ in rows) == REAL
    for name, file, _, calls in rows:
        assert name == file
        assert int(calls) == calls_of(Recipe.load(name)), name


def calls_of(recipe: Recipe) -> int:
    """Network calls of one image, at guidance scale 1."""
    from stepdistill.recipe import build_objective

    spec = build_objective(recipe.stages[-1].objective, recipe.source).inference()
    assert spec is not None
    return spec.num_steps


@pytest.mark.parametrize("name", REAL)
def test_every_setting_says_by_whose_example_it_is(name: str) -> None:
    text = bundled_recipes()[name].read_text(encoding="utf-8")
    assert unsourced(text) == []
    assert len(SOURCE.findall(text)) > 0


@pytest.mark.parametrize(
    "line",
    ["    steps: 100", "    steps: 100  #", "    steps: 100  # because", "    steps: 100  # DMD2", "  - weight: 1.0",
     "        weights: full", "      timesteps: [999, 749]"],
)  # fmt: skip
def test_a_setting_without_a_source_or_with_one_that_is_not_introduced_is_found(line: str) -> None:
    text = "seed: 0\nstages:\n  - objective: &a\n      name: dmd  # DMD (arXiv:2311.18828)\n    batch_size: 1  # DMD\n"
    assert unsourced(text) == []
    assert unsourced(text + line + "\n") == [line]


@pytest.mark.parametrize("name", REAL)
def test_an_update_is_made_of_the_published_number_of_samples(name: str) -> None:
    stages = Recipe.load(name).stages
    assert tuple(stage.batch_size * stage.accumulate for stage in stages) == SAMPLES[name]


@pytest.mark.parametrize(("name", "stage", "steps", "rate", "options"), PUBLISHED)
def test_lengths_rates_and_options_are_the_published_ones(
    name: str, stage: int, steps: int, rate: float, options: dict[str, Any]
) -> None:
    recipe = Recipe.load(name)
    found = options_at(recipe, stage)
    assert {key: found[key] for key in options} == options
    assert recipe.stages[stage].steps == steps
    assert recipe.stages[stage].player("student").optimizer.lr == rate


@pytest.mark.parametrize(
    "name", [name for name in REAL if "dmd2" in name and "sd3" not in name and "flux" not in name]
)
def test_dmd2_warms_student_and_critic_up_in_the_same_iterations(name: str) -> None:
    for stage in Recipe.load(name).stages:
        if stage.objective.name == "dmd2":
            critic, student = stage.player("critic"), stage.player("student")
            ratio = stage.objective.options["critic_updates"]
            assert critic.warmup_steps == student.warmup_steps * ratio == 500
            assert (critic.clip, critic.optimizer.options["weight_decay"]) == (10, 0.01)


@pytest.mark.parametrize("name", REAL)
def test_a_stage_keeps_the_kind_of_weights_that_it_is_handed(name: str) -> None:
    """A run of days must not be refused at its second stage."""
    from stepdistill.recipe import build_objective
    from stepdistill.stages import trained_roles

    known: dict[str, Any] = {}
    for index, stage in enumerate(Recipe.load(name).stages):
        for role in trained_roles(build_objective(stage.objective, f"{name}: {index}")):
            kind = stage.player(role).lora
            if stage.starts.get(role) != "teacher":
                assert known.get(role, kind) == kind, role
            known[role] = kind


@pytest.mark.parametrize("name", REAL)
def test_nothing_is_measured_with_the_shapes_benchmark_or_read_from_a_path_of_ours(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.bench is None
    assert re.fullmatch(r"[\w-]+/[\w.-]+", recipe.teacher), "a hub id"
    assert recipe.output == f"runs/{recipe.name}"
    assert "assets/" not in bundled_recipes()[name].read_text(encoding="utf-8")


def test_a_small_objective_names_no_part_of_a_real_network_and_no_file_of_a_user() -> None:
    sprint = options_at(Recipe.load("sana/sprint_4step"), 0)
    assert small_objective(sprint) == {**sprint, "layers": []}
    start = small_objective(options_at(Recipe.load("sdxl/dmd2_1step"), 0))
    assert (start["distance"], start["lpips"], start["timestep"]) == ("l2", None, 399)
    vsd, clip = (
        part["objective"] for part in small_objective(options_at(Recipe.load("sd21/snoopi_1step"), 0))["parts"]
    )
    assert (ROOT / clip["model"] / "config.json").is_file()
    assert clip["weight_steps"] == 2
    assert isinstance(vsd["negatives"], list)
    assert vsd["guidance"] == [0.5, 4.0], "everything else stays"
    judge = {"reward": {"name": "clip", "model": "mine"}, "margin": 0.5}
    assert small_objective({"name": "reward", "rewards": [judge]})["rewards"][0]["reward"]["model"] == clip["model"]


def test_pairs_are_made_in_few_steps_unless_certain_timesteps_are_kept() -> None:
    assert small_pairs({"steps": 999, "states": "all", "guidance": [1, 2]})["steps"] < 10
    kept = {"steps": 50, "states": [999, 499]}
    assert small_pairs(kept) == kept


@pytest.mark.parametrize("name", REAL)
def test_whole_recipes_are_small_ones_too(name: str) -> None:
    """What smoke tests play can be built: the shortened options are options of the same objectives."""
    from stepdistill.recipe import build_objective
    from stepdistill.recipe_sections import ObjectiveConfig

    for index, stage in enumerate(Recipe.load(name).stages):
        entry = small_objective(options_at(Recipe.load(name), index))
        small = build_objective(ObjectiveConfig.model_validate(entry), f"{name}: {index}")
        assert type(small) is type(build_objective(stage.objective, name))


def test_the_published_learning_rates_of_critics_are_kept_apart_from_the_students() -> None:
    def rate(name: str) -> float:
        return Recipe.load(name).stages[0].player("critic").optimizer.lr

    vsd = ["sd15/swiftbrush_1step", "sd21/swiftbrush_1step", "sd21/snoopi_1step", "pixart/pg_sb_1step"]
    assert [rate(name) for name in vsd] == [1e-3] * 4
    ranks = [Recipe.load(name).stages[0].player("critic").lora for name in vsd]
    assert [(lora.rank, lora.alpha) for lora in ranks if lora] == [(64, 108), (64, 108), (64, 128), (64, 128)]


def test_hyper_sd_s_segments_halve_from_stage_to_stage() -> None:
    segments = [stage.objective.options["segments"] for stage in Recipe.load("sdxl/hyper_tscd").stages]
    assert segments == [8, 4, 2, 1]
