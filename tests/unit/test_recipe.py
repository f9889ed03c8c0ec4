"""Recipes: strict, complete, and with errors of one line that name the place and the remedy."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stepdistill.errors import UserError
from stepdistill.options import build_dataclass
from stepdistill.recipe import Recipe, build_objective, bundled_recipes, optimizer_class
from stepdistill.recipe_sections import ObjectiveConfig, OptimizerConfig, PlayerConfig
from stepdistill.recipe_text import parse_yaml
from stepdistill.teacher_kind import resolve


ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """\
name: tiny
teacher: some/folder
data: {prompts: shapes}
stages:
  - objective: {name: dmd2, guidance: 3.0}
    steps: 10
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str) -> Path:
        file = tmp_path / "x.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return written


def mistakes(file: Path, *overrides: str) -> list[str]:
    """The lines of the error, the file's folder left out."""
    with pytest.raises(UserError) as caught:
        Recipe.load(file, overrides)
    return str(caught.value).replace(f"{file.parent}/", "").splitlines()


def load(file: Path, *overrides: str) -> Recipe:
    return Recipe.load(file, overrides)


def test_a_minimal_recipe_gets_the_documented_defaults(write: Any) -> None:
    recipe = load(write(MINIMAL))
    assert recipe.output == "runs/tiny"
    assert (recipe.precision, recipe.device, recipe.seed, recipe.bench) == ("fp32", "auto", 0, None)
    player = recipe.stages[0].player("student")
    assert player.lora is None
    assert (player.optimizer.name, player.schedule, player.clip, player.ema) == ("AdamW", "constant", 1.0, None)


@pytest.mark.parametrize(
    ("wrong", "right", "line"),
    [
        ("    steps: 10", "    stepz: 10", "x.yaml: stages.0.stepz: unknown key; did you mean 'steps'?"),
        ("    steps: 10", "    steps: ten", "x.yaml: stages.0.steps: expected an integer, got 'ten'"),
        ("    steps: 10", "    steps: true", "x.yaml: stages.0.steps: expected an integer, got True"),
        ("    steps: 10", "    steps: 0", "x.yaml: stages.0.steps: expected more than 0, got 0"),
        ("    steps: 10", "", "x.yaml: stages.0.steps: missing; this key has no default"),
        ("name: tiny", "name: a/b", "x.yaml: name: expected letters, digits and any of _ . -"),
        ("name: tiny", "name: tiny\nprecision: bf61", "did you mean 'bf16'?"),
        ("name: tiny", "name: tiny\nseed: [1]", "x.yaml: seed: expected an integer, got [1]"),
        ("{prompts: shapes}", "shapes", "x.yaml: data: expected a mapping, got 'shapes'"),
        ("{prompts: shapes}", "{prompts: shapes, cache: 1}", "x.yaml: data.cache: expected true or false, got 1"),
        ("teacher:", "techer:", "x.yaml: techer: unknown key; did you mean 'teacher'?"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_remedy(write: Any, wrong: str, right: str, line: str) -> None:
    assert wrong in MINIMAL
    lines = mistakes(write(MINIMAL.replace(wrong, right)))
    assert len(lines) == 1, lines
    assert line in lines[0]
    assert re.match(r"x\.yaml: [\w.]+: \S", lines[0])


def test_two_mistakes_are_two_lines(write: Any) -> None:
    assert mistakes(write(MINIMAL.replace("    steps: 10", "    zzz: 10\n    batch_sise: 4"))) == [
        "x.yaml: stages.0.steps: missing; this key has no default",
        "x.yaml: stages.0.zzz: unknown key; valid: objective, steps, batch_size, accumulate, checkpointing, players, "
        "starts",
        "x.yaml: stages.0.batch_sise: unknown key; did you mean 'batch_size'?",
    ]


def test_a_key_that_resembles_nothing_gets_the_list_of_valid_ones(write: Any) -> None:
    assert mistakes(write(MINIMAL + "checkpoints: {zzz: 1}\n")) == [
        "x.yaml: checkpoints.zzz: unknown key; valid: every, keep"
    ]


@pytest.mark.parametrize(
    ("players", "line"),
    [
        ("{default: {weights: half}}", "default.weights: expected 'full' or a mapping, got 'half'"),
        ("{student: {weights: {lora: {rnk: 3}}}}", "student.weights.lora.rnk: unknown key; did you mean 'rank'?"),
        ("{student: {weights: {lora: {rank: 0}}}}", "student.weights.lora.rank: expected more than 0, got 0"),
        ("{student: {ema: 1}}", "student.ema: expected less than 1, got 1"),
        ("{student: {optimizer: {lr: fast}}}", "student.optimizer.lr: expected a number, got 'fast'"),
        ("{student: {optimizer: {lr: true}}}", "student.optimizer.lr: expected a number, got True"),
        ("{student: {clip: .inf}}", "student.clip: expected a finite number, got inf"),
    ],
)
def test_a_mistake_deep_inside_a_choice_is_told_once(write: Any, players: str, line: str) -> None:
    assert mistakes(write(MINIMAL + f"    players: {players}\n")) == [f"x.yaml: stages.0.players.{line}"]


def test_a_value_that_may_have_two_types_names_both(write: Any) -> None:
    assert mistakes(write(MINIMAL + "previews: {prompts: {a: 1}}\n")) == [
        "x.yaml: previews.prompts: expected an integer or a list, got a mapping"
    ]


def test_a_warm_up_that_the_constant_schedule_would_ignore_is_refused(write: Any) -> None:
    lines = mistakes(write(MINIMAL + "    players: {student: {warmup_steps: 5}}\n"))
    assert len(lines) == 1
    assert "student: schedule 'constant' has no warm-up; use 'constant_with_warmup'" in lines[0]


def test_broken_yaml_names_the_line(write: Any) -> None:
    assert mistakes(write("name: a\nteacher: [b\ndata: {}\n"))[0].startswith("x.yaml:3: not valid YAML: ")


def test_a_key_given_twice_is_an_error_at_its_second_line(write: Any) -> None:
    assert mistakes(write(MINIMAL + "    steps: 20\n")) == ["x.yaml:7: not valid YAML: the key 'steps' comes twice"]


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(write: Any, text: str) -> None:
    assert mistakes(write(text))[0].startswith("x.yaml: expected a mapping with the keys name, output, ")


def test_yaml_tags_cannot_run_code(write: Any) -> None:
    lines = mistakes(write("name: !!python/object/apply:os.system ['true']\n"))
    assert len(lines) == 1
    assert lines[0].startswith("x.yaml:1: not valid YAML: could not determine a constructor for the tag")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00name")
    assert mistakes(file)[0].startswith("x.yaml: cannot be read as UTF-8 text")


def test_a_yaml_value_that_contains_itself_is_refused(write: Any) -> None:
    assert mistakes(write("name: &a [*a]\n"))[0].startswith("x.yaml: holds values that are not plain data")


def test_a_missing_file_names_the_nearest_existing_recipe(write: Any) -> None:
    file = write(MINIMAL)
    assert mistakes(file.with_name("y.yaml")) == [f"y.yaml: no such recipe; did you mean {str(file)!r}?".replace(
        f"{file.parent}/", "")]  # fmt: skip
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        Recipe.load("quikstart")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", "1E-4", ".1e-3", "10e-5", "+1e-4"])
def test_numbers_with_an_exponent_are_numbers(write: Any, text: str) -> None:
    recipe = load(write(MINIMAL + f"    players: {{default: {{optimizer: {{lr: {text}}}}}}}\n"))
    assert recipe.stages[0].player("student").optimizer.lr == pytest.approx(1e-4, rel=1e-12)


def test_whole_numbers_are_good_for_float_keys(write: Any) -> None:
    assert load(write(MINIMAL), "bench.teacher_guidance=2").bench.teacher_guidance == 2.0


def test_overrides_are_read_as_yaml_and_reach_lists_and_absent_sections(write: Any) -> None:
    recipe = load(
        write(MINIMAL), "stages.0.steps=7", "teacher=other=folder", "bench.prompts=8", "previews=null",
        "data.count=1_000", "stages.0.players.student.optimizer.betas=[0.5, 0.9]",
    )  # fmt: skip
    assert recipe.stages[0].steps == 7
    assert recipe.teacher == "other=folder"
    assert recipe.bench is not None and recipe.bench.prompts == 8
    assert recipe.previews is None
    assert recipe.data.count == 1000
    assert recipe.stages[0].player("student").optimizer.options == {"betas": [0.5, 0.9]}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages.0.stepz=10", "override stages.0.stepz: unknown key; did you mean 'steps'?"),
        ("stages.0.batch_size=ten", "override stages.0.batch_size: expected an integer, got 'ten'"),
        ("stages.1.steps=10", "override stages.1.steps: '1' is not an entry of the list; valid: 0 to 0"),
        ("stages.first.steps=10", "override stages.first.steps: 'first' is not an entry of the list; valid: 0 to 0"),
        ("teacher.path=a", "override teacher.path: teacher is 'some/folder' and has no keys"),
        ("seed", "override 'seed': expected key.path=value, for example stages.0.steps=100"),
        ("=3", "override '=3': expected key.path=value, for example stages.0.steps=100"),
        ("previews={zzz: 1}", "override previews.zzz: unknown key; valid: every, prompts, seed"),
    ],
)
def test_a_mistake_in_an_override_names_the_override_and_not_the_file(write: Any, override: str, line: str) -> None:
    assert mistakes(write(MINIMAL), override) == [line]


def test_players_take_what_they_do_not_say_from_the_default(write: Any) -> None:
    players = """
    players:
      default: {weights: {lora: {rank: 8, targets: [to_q]}}, optimizer: {lr: 1e-3, betas: [0.9, 0.99]}, ema: 0.9}
      student: {weights: {lora: {rank: 4}}}
      critic: {weights: full, optimizer: {weight_decay: 0.1}, ema: null}
      head: {optimizer: {name: SGD, momentum: 0.9}}
"""
    stage = load(write(MINIMAL + players)).stages[0]
    student, critic, head = (stage.player(role) for role in ("student", "critic", "head"))
    assert student.lora is not None
    assert (student.lora.rank, student.lora.alpha, student.lora.targets, student.ema) == (4, 4.0, ("to_q",), 0.9)
    assert critic.lora is None and critic.ema is None
    assert critic.optimizer.options == {"betas": [0.9, 0.99], "weight_decay": 0.1}
    assert (head.optimizer.lr, head.optimizer.options) == (1e-3, {"momentum": 0.9}), "AdamW's betas are not SGD's"
    assert stage.player("somebody else") == stage.player("default")


def test_players_of_roles_that_are_not_trained_are_refused(write: Any) -> None:
    recipe = load(write(MINIMAL + "    players: {studnet: {ema: 0.9}}\n"))
    recipe.stages[0].check_roles(["studnet"], "x")
    with pytest.raises(UserError, match=r"stages\.0\.players\.studnet: unknown role; did you mean 'student'\?"):
        recipe.stages[0].check_roles(["student", "critic"], recipe.where("stages.0"))


def test_the_resolved_yaml_reads_back_to_the_same_recipe(write: Any) -> None:
    text = (
        MINIMAL
        + """\
    players:
      default: {optimizer: {lr: 1e-5, betas: [0.9, 0.99]}, ema: 0.9}
      student: {weights: {lora: {rank: 4}}, optimizer: {name: SGD}}
previews: {prompts: [a, 'no', '1e-4', '12', 'null', 'a: b', "caf\\u00e9"]}
bench: {}
"""
    )
    first = load(write(text))
    again = Recipe.from_mapping(parse_yaml(first.to_yaml(), "again"), source=first.source)
    assert again == first
    assert again.sha256 == first.sha256
    assert again.to_yaml() == first.to_yaml()
    assert "caf\u00e9" in again.previews.prompts
    assert "teacher_guidance: 3.0" in first.to_yaml(), "defaults are written out"


def test_a_key_that_is_younger_than_published_results_changes_no_fingerprint_unless_it_says_something(
    write: Any,
) -> None:
    base = load(write(MINIMAL))
    content = base.model_dump(mode="json", exclude={"output", "device", "health", "student", "multi_student"})
    del content["teacher_config"], content["teacher_loras"], content["export"]["lora_format"]
    del content["attention"], content["memory"], content["with_flow_teacher"]
    for key in ("make_pairs", "buckets", "cache_folder", "workers"):
        del content["data"][key]
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert base.sha256 == hashlib.sha256(plain.encode()).hexdigest()
    for change in ("data.make_pairs={count: 4}", "multi_student={students: 2}", "teacher_loras=[{path: a}]",
                   "teacher_config=a", "export.lora_format=both", "attention=math", "memory.base=bf16",
                   "with_flow_teacher={seed: 1}"):  # fmt: skip
        assert load(write(MINIMAL), change).sha256 != base.sha256, change


FLOW = (
    MINIMAL
    + """\
with_flow_teacher:
  stages.0.objective.guidance: 5.0
  stages.0.objective.timesteps: [999]
  data.count: 7
"""
)


def test_what_is_said_of_a_flow_teacher_counts_with_one_alone_and_less_than_the_command(write: Any) -> None:
    def guidance(*overrides: str) -> Any:
        recipe = resolve(load(write(FLOW), *overrides))
        assert recipe.with_flow_teacher is None, "settled, so that a run's record says what was run"
        return recipe.stages[0].objective.options["guidance"], recipe.data.count, recipe.source

    source = load(write(FLOW)).source
    plain = resolve(load(write(MINIMAL), "teacher=tiny:sd"))
    assert resolve(load(write(FLOW), "teacher=tiny:sd")).sha256 == plain.sha256
    assert guidance("teacher=tiny:sd") == (3.0, plain.data.count, source)
    assert guidance("teacher=tiny:sd3") == (5.0, 7, source)
    assert guidance("teacher=tiny:sd3", "stages.0.objective.guidance=2.0") == (2.0, 7, source)
    assert guidance("teacher=tiny:sd3", "stages.0.objective={name: dmd2, guidance: 2.0}")[0] == 2.0
    assert guidance("teacher=tiny:sd3", "data={prompts: shapes, count: 9}")[1] == 9


def test_the_kind_of_a_stored_teacher_is_read_from_its_scheduler(write: Any, tmp_path: Path) -> None:
    def count(kind: str) -> int:
        folder = tmp_path / kind
        (folder / "scheduler").mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
        return resolve(load(write(FLOW), f"teacher={folder}")).data.count

    assert count("FlowMatchEulerDiscreteScheduler") == 7
    assert count("DDIMScheduler") != 7
    (tmp_path / "DDIMScheduler/scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match=r"scheduler_config\.json is damaged"):
        resolve(load(write(FLOW), f"teacher={tmp_path / 'DDIMScheduler'}"))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("{stages.0.stps: 5}", "x.yaml, with_flow_teacher: stages.0.stps: unknown key; did you mean 'steps'?"),
        ("{stages.3.steps: 5}", "with_flow_teacher stages.3.steps: '3' is not an entry of the list; valid: 0 to 0"),
        ("{'': 5}", "with_flow_teacher '=5': expected key.path=value, for example stages.0.steps=100"),
    ],
)
def test_a_mistake_in_what_is_said_of_a_flow_teacher_is_found_with_every_teacher(
    write: Any, said: str, line: str
) -> None:
    assert mistakes(write(f"{MINIMAL}with_flow_teacher: {said}\n")) == [line]


def test_the_fingerprint_changes_with_the_content_but_not_with_output_or_device(write: Any) -> None:
    base = load(write(MINIMAL))
    assert load(write(MINIMAL), "output=elsewhere", "device=cpu").sha256 == base.sha256
    assert load(write("# a comment\n" + MINIMAL), "seed=0").sha256 == base.sha256
    for change in ("seed=1", "stages.0.objective.guidance=2.0", "stages.0.players.student.ema=0.9", "teacher=a"):
        assert load(write(MINIMAL), change).sha256 != base.sha256, change


def test_a_recipe_cannot_be_changed_after_it_was_read(write: Any) -> None:
    recipe = load(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_objectives_get_their_options_with_the_types_of_their_fields() -> None:
    built: Any = build_objective(ObjectiveConfig(name="dmd2", timesteps=[999, 499], guidance=4), "x")
    assert built.timesteps == (999, 499)
    assert built.guidance == 4.0 and isinstance(built.guidance, float)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"guidence": 1.0}, ["x: stages.0.objective.guidence: unknown key; did you mean 'guidance'?"]),
        ({"critic_updates": True}, ["x: stages.0.objective.critic_updates: expected an integer, got True"]),
        ({"critic_updates": 2.5}, ["x: stages.0.objective.critic_updates: expected an integer, got 2.5"]),
        ({"timesteps": 999}, ["x: stages.0.objective.timesteps: expected a list, got 999"]),
        ({"timesteps": [999, "a"]}, ["x: stages.0.objective.timesteps.1: expected an integer, got 'a'"]),
        ({"t_min": "a", "zzzz": 1}, ["x: stages.0.objective.t_min: expected a number, got 'a'",
                                     "x: stages.0.objective.zzzz: unknown key; valid: timesteps, guidance, "]),
    ],
)  # fmt: skip
def test_a_mistaken_option_of_an_objective_is_a_line(options: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_objective(ObjectiveConfig(name="dmd2", **options), "x: stages.0.objective")
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    assert all(text.startswith(line) for text, line in zip(found, lines, strict=True)), found


def test_an_unknown_objective_names_the_place_and_the_nearest_one() -> None:
    with pytest.raises(
        UserError, match=r"x: stages\.0\.objective\.name: unknown objective 'dmd22'; did you mean 'dmd2'"
    ):
        build_objective(ObjectiveConfig(name="dmd22"), "x: stages.0.objective")


def test_a_class_without_fields_cannot_be_an_objective_of_a_recipe() -> None:
    with pytest.raises(UserError, match="no dataclass"):
        build_objective(ObjectiveConfig(name="pathlib:Path"), "x")


@dataclass
class Demanding:
    """Has a field without a default, and an opinion."""

    size: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError("share is at most 1")


def test_fields_without_a_default_must_be_given_and_a_mistyped_one_is_told_once() -> None:
    with pytest.raises(UserError) as caught:
        build_dataclass(Demanding, {"sise": 1}, "x")
    assert str(caught.value) == "x.sise: unknown key; did you mean 'size'?"
    with pytest.raises(UserError, match=r"x\.size: missing"):
        build_dataclass(Demanding, {}, "x")


def test_what_a_class_itself_refuses_is_told_with_the_place() -> None:
    assert build_dataclass(Demanding, {"size": 1, "share": 1}, "x").share == 1.0
    with pytest.raises(UserError, match="x: share is at most 1"):
        build_dataclass(Demanding, {"size": 1, "share": 2}, "x")


def test_optimizers_are_found_by_name_and_by_path_and_their_options_checked() -> None:
    import torch

    assert optimizer_class(OptimizerConfig(betas=[0.9, 0.99]), "x") is torch.optim.AdamW
    assert optimizer_class(OptimizerConfig(name="torch.optim.SGD", momentum=0.9), "x") is torch.optim.SGD
    with pytest.raises(UserError, match=r"x\.name: unknown optimizer 'AdaW'; did you mean 'AdamW'"):
        optimizer_class(OptimizerConfig(name="AdaW"), "x")
    with pytest.raises(UserError, match="unknown optimizer 'lr_scheduler'"):
        optimizer_class(OptimizerConfig(name="lr_scheduler"), "x")
    with pytest.raises(UserError, match=r"x\.weigth_decay: unknown key; did you mean 'weight_decay'"):
        optimizer_class(OptimizerConfig(weigth_decay=0.1), "x")


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_every_bundled_recipe_is_complete_and_plays_a_known_objective(name: str) -> None:
    recipe = Recipe.load(name)
    resolved = recipe.resolved()
    assert Recipe.from_mapping(parse_yaml(resolved.to_yaml(), name), source=recipe.source) == resolved
    for index, stage in enumerate(recipe.stages):
        objective = build_objective(stage.objective, recipe.where(f"stages.{index}.objective"))
        stage.check_roles(list(objective.roles()), recipe.where(f"stages.{index}"))
        for role, player in stage.players.items():
            assert isinstance(player, PlayerConfig)
            optimizer_class(player.optimizer, f"{name}: {role}")


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_every_bundled_recipe_is_executable_and_says_where_its_numbers_come_from(name: str) -> None:
    file = bundled_recipes()[name]
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env -S stepdistill train"
    assert file.stat().st_mode & 0o111
    numbers = re.compile(r"[ \[]\d[\d.e-]*[,}\]]*$")
    bare = [line for line in lines if "#" not in line and line != "seed: 0" and numbers.search(line)]
    assert not bare, f"{file}: whose numbers are these?"


def test_the_bundled_recipes_are_all_there() -> None:
    assert {
        "quickstart",
        "shapes/teacher",
        "shapes/flow_teacher",
        "shapes/dmd2_1step",
        "shapes/dmd2_plain_1step",
        "shapes/vsd_1step",
        "shapes/dmd2_4step",
    } <= set(bundled_recipes())


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("output", "teacher", "teacher_config", "data.prompts", "data.images", "data.pairs", "data.cache_folder",
            "bench.evaluator", "stages.0.starts.student")  # fmt: skip
    recipe = Recipe.load("quickstart", [*(f"{key}=~/x" for key in keys), "teacher_loras=[{path: ~/x}]"])
    content = recipe.model_dump(mode="json")
    assert "~" not in json.dumps(content)
    assert (recipe.output, recipe.teacher_loras[0].path, recipe.stages[0].starts) == (
        str(tmp_path / "x"), str(tmp_path / "x"), {"student": str(tmp_path / "x")})  # fmt: skip
    assert Recipe.load("quickstart", ["teacher=owner/~name"]).teacher == "owner/~name"
