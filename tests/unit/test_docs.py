"""What the documentation says exists: commands, keys, options, symbols, links, and the cells marked as tested."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from PIL import Image
from pydantic import BaseModel

import stepdistill
from benchmarks import render_tables
from stepdistill import Recipe
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.cli import app
from stepdistill.cli_bench import MEASURE
from stepdistill.cli_models import COMMA
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES, family_class
from stepdistill.families.tiny import TINY_PIPELINES
from stepdistill.objectives import OBJECTIVES, resolve
from stepdistill.recipe import build_objective, bundled_recipes
from stepdistill.recipe_sections import PlayerConfig, StageConfig
from stepdistill.run import train
from stepdistill.stages import trained_roles


ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")),
             *sorted((ROOT / "examples").glob("*.md"))]  # fmt: skip
PENDING = re.compile(r"<!-- pending results:([\w.-]+) -->\n")
TESTED_CELLS = [
    ("sd", "denoising", {}), ("sd", "vsd", {}), ("sd", "dmd2", {}),
    ("sd", "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("sd3", "denoising", {}), ("sd3", "vsd", {}), ("sd3", "dmd2", {}),
    ("sd3", "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("sdxl", "denoising", {}), ("sdxl", "vsd", {}), ("sdxl", "dmd2", {}),
    ("sdxl", "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("dit", "denoising", {}), ("dit", "vsd", {}), ("dit", "dmd2", {}),
    ("dit", "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("pixart", "denoising", {}), ("pixart", "vsd", {}), ("pixart", "dmd2", {}),
    ("pixart", "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("pixart_sigma", "dmd2", {}),
    ("flux", "denoising", {}), ("flux", "vsd", {}), ("flux", "dmd2", {}),
    ("flux", "dmd2", {"timesteps": [999, 749, 499, 249]}),
    ("sana", "denoising", {}), ("sana", "vsd", {}), ("sana", "dmd2", {}),
    ("sana", "dmd2", {"timesteps": [999, 749, 499, 249]}),
]  # fmt: skip
SIZES = {"pixart": 64, "pixart_sigma": 64, "sana": 64}  # pixels; that of others is 16


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(where, content) of every code block of a language."""
    for document in DOCUMENTS:
        for number, match in enumerate(re.finditer(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)):
            if match[1] == language:
                yield f"{document.relative_to(ROOT)}#{number}", match[2]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every command in a bash block, without environment variables in front."""
    for where, content in blocks("bash"):
        for line in content.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if not words:
                    continue
                yield where, list(itertools.dropwhile(lambda word: re.match(r"^[A-Z]+=", word), words))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are meant to be typed in the checkout, those of own objectives with examples on Python's path."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_the_readme_prints_the_two_commands_of_a_new_user() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install -e . && stepdistill train recipes/quickstart.yaml\n" in text
    assert 'pip install -e ".[test]" && pytest\n' in text


def test_every_command_in_the_documentation_is_understood() -> None:
    found = list(commands())
    assert len(found) > 20, "the documents have lost their commands"
    for where, words in found:
        if words[0] == "stepdistill":
            check_own_command(where, words[1:])
        elif words[0] == "accelerate":
            check_own_command(where, words[words.index("stepdistill") + 1 :])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), f"{where}: there is no {words[1]}"
        else:
            assert words[0] in ("pip", "pytest"), f"{where}: unexpected command {' '.join(words)}"


def check_own_command(where: str, words: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    if words[0] == "bench":
        check_bench(where, command, words[1:])
        return
    context = command.make_context(words[0], words[1:])  # a usage error for unknown options
    if words[0] == "train":
        check_recipe(where, Recipe.load(context.params["recipe"], context.params["overrides"] or []))


def check_recipe(where: str, recipe: Recipe) -> None:
    """What a run refuses before its first step, as far as it needs no teacher."""
    recipe.resolved()
    for index, stage in enumerate(recipe.stages):
        objective = build_objective(stage.objective, f"{where}: stages.{index}.objective")
        stage.check_roles(trained_roles(objective), f"{where}: stages.{index}")


def test_a_command_whose_players_its_objective_does_not_train_would_be_seen() -> None:
    own = "stages.0.objective={name: own_objective:Regression}"
    with pytest.raises(UserError, match=r"here: stages\.0\.players\.critic: unknown role"):
        check_own_command("here", ["train", "shapes/vsd_1step", own])


def test_a_run_that_a_page_samples_measures_or_exports_is_one_that_it_trains() -> None:
    bundled = [Recipe.load(file) for file in bundled_recipes().values()]
    trained: dict[str, list[Recipe]] = {}
    made: dict[str, list[str]] = {}
    found = [(where.partition("#")[0], words[1:]) for where, words in commands() if words[0] == "stepdistill"]
    for page, words in found:
        given = parameters(words)
        if words[0] == "train":
            trained.setdefault(page, []).append(Recipe.load(given["recipe"], given["overrides"] or []))
        elif words[0] in ("export", "merge"):
            made.setdefault(page, []).append(str(given["output"]))
    seen = 0
    for page, words in found:
        for run in used_runs(words):
            recipes = [recipe for recipe in [*trained.get(page, []), *bundled] if recipe.output == run]
            assert recipes or run in made.get(page, []), f"{page}: nothing makes the folder of {' '.join(words)}"
            seen += 1
            checkpoint = parameters(words)["checkpoint"] if words[0] == "export" else None
            if checkpoint is not None:
                name = str(int(checkpoint.removeprefix("step-"))) if "stage" not in checkpoint else checkpoint
                kept = {name for recipe in recipes for name in kept_checkpoints(recipe)}
                assert name in kept, f"{page}: {run} keeps {', '.join(sorted(kept))} and no {name}"
    assert seen > 10, "the documents have lost their runs"


def parameters(words: list[str]) -> dict[str, Any]:
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    if words[0] == "bench":
        name = words[1] if words[1] in command.commands else MEASURE
        command, words = command.commands[name], words[words[1] == name :]
    found: dict[str, Any] = command.make_context(words[0], words[1:]).params
    return found


def used_runs(words: list[str]) -> list[str]:
    """The folders runs/X that a command reads models from."""
    if words[0] not in ("sample", "bench", "export"):
        return []
    given = parameters(words)
    models = [given.get(key) for key in ("model", "models", "run", "base")]
    several = [value if isinstance(value, list | tuple) else [value] for value in models if value]
    texts = [str(text) for value in several for text in value]
    paths = [COMMA.split(text)[0].rpartition("=")[2] for text in texts]
    return ["/".join(path.split("/")[:2]) for path in paths if path.startswith("runs/")]


def kept_checkpoints(recipe: Recipe) -> set[str]:
    """What `stepdistill export --checkpoint` finds when a run is over."""
    numbers, before = list[int](), 0
    for stage in recipe.stages:
        due = [k for k in range(1, stage.steps + 1) if k == stage.steps or k % recipe.checkpoints.every == 0]
        numbers += [before + k for k in due]
        before += stage.steps
    ends = {f"stage-{index}" for index in range(len(recipe.stages))}
    return ends | {str(number) for number in numbers[-recipe.checkpoints.keep :]}


def check_bench(where: str, group: Any, words: list[str]) -> None:
    name = words.pop(0) if words[0] in group.commands else MEASURE
    given = group.commands[name].make_context(name, words).params
    known = {field.name for field in dataclasses.fields(ModelUnderTest)} | {"nfe"}
    for text in [*(given.get("models") or []), *(given.get("model") or [])]:
        keys = {pair.partition("=")[0] for pair in COMMA.split(text)[1:]}
        assert keys <= known, f"{where}: unknown key of a model in {text}"


def test_every_recipe_snippet_is_a_valid_part_of_a_recipe() -> None:
    base = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    del base["with_flow_teacher"]  # of its own stages
    found = list(blocks("yaml"))
    assert found, "the documents have lost their recipes"
    for where, content in found:
        Recipe.from_mapping({**base, **yaml.safe_load(content)}, source=where).resolved()


def test_every_python_snippet_compiles_and_imports_what_exists() -> None:
    found = list(blocks("python"))
    assert len(found) > 5, "the documents have lost their snippets"
    for where, content in found:
        compile(content, where, "exec", dont_inherit=True)
        for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)$", content, re.M):
            loaded = importlib.import_module(module)
            for name in names.split(", "):
                getattr(loaded, name)


def test_the_objective_in_the_readme_is_the_one_in_the_examples() -> None:
    ((_, shown),) = [b for b in blocks("python") if "class Regression" in b[1]]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(shown, "README.md", "exec", dont_inherit=True), names)
    example = importlib.import_module("own_objective").Regression
    fields = [[(f.name, f.default) for f in dataclasses.fields(kind)] for kind in (names["Regression"], example)]
    assert fields[0] == fields[1]
    assert names["Regression"]().inference() == example().inference()
    ((_, trained),) = [b for b in blocks("bash") if "own_objective:" in b[1]]
    printed = str(sys.modules["own_objective"].__doc__).partition("Run it:")[2]
    assert printed.split() == trained.replace("\\\n", "").split(), "the example's docstring prints another command"


def test_every_relative_link_leads_to_a_file() -> None:
    missing = []
    for document in DOCUMENTS:
        text = document.read_text()
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" in target or (document.parent / target).exists():
                continue
            # Pictures of results may be absent for as long as the results are.
            if not (target.startswith("docs/images/") and PENDING.search(text)):
                missing.append(f"{document.relative_to(ROOT)}: {target}")
    assert not missing


def test_every_symbol_that_is_named_with_its_file_exists() -> None:
    found = [m for d in DOCUMENTS for m in re.findall(r"`stepdistill/([\w/]+)\.py:([\w.]+)`", d.read_text())]
    assert len(found) > 20, "the documents have lost their references to the code"
    for path, symbol in found:
        target: Any = importlib.import_module("stepdistill." + path.replace("/", "."))
        for name in symbol.split("."):
            target = getattr(target, name)


def published_tables() -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """(heading, what its section says before the table, rows) of every table of published numbers."""
    heading, said, rows = "", "", list[list[str]]()
    for line in [*(ROOT / "docs/published.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            yield heading, said, [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
            rows = []
        heading, said = (line.strip("# "), "") if line.startswith("#") else (heading, f"{said} {line}")


def test_every_published_number_has_its_protocol_and_its_source() -> None:
    tables = list(published_tables())
    assert len(tables) >= 6, "the tables have gone"
    sources = (ROOT / "docs/published.md").read_text().partition("## Sources")[2]
    known = {re.sub(r"\s+", " ", name).strip() for name in re.findall(r"(?:^|,)([^,\[\]]+)\[\d{4}\.\d{5}\]", sources)}
    assert {"DMD2", "SDXL-Lightning", "ADD"} <= known
    for heading, said, rows in tables:
        count = re.search(r"\d[\d,]* (?:\w+ ){0,2}?(?:captions|prompts|images)", f"{heading} {said}")
        assert count, f"{heading}: how many images?"
        assert re.search("COCO|ImageNet|the score's own", f"{heading} {said}"), f"{heading}: which prompts or images?"
        assert rows and all(re.fullmatch(r"[\d.]+|-", row["NFE"]) for row in rows), heading
        if "from" not in rows[0]:
            assert "Read from the methods' papers" in said, f"{heading}: whose numbers are these?"
            continue
        for row in rows:
            via = row["from"].removeprefix("via ")
            assert row["from"] == "paper" or via in known, f"{heading}: {row['model']} is from {row['from']}"


def test_the_map_of_the_code_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Map of the code")[2].partition("```")[2].partition("```")[0]
    lines = section.strip().splitlines()
    assert len(lines) == 10
    for line in lines:
        first, *others = line.partition("  ")[0].split(", ")
        for path in (first, *(o if o.startswith("stepdistill") else f"stepdistill/{o}" for o in others)):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_option_of_an_objective_is_on_its_page(name: str) -> None:
    page = (ROOT / f"docs/objectives/{name}.md").read_text()
    assert [f.name for f in dataclasses.fields(resolve(name)) if f"`{f.name}`" not in page] == []
    headings = re.findall(r"^## (.*)$", page, re.M)
    assert headings == ["Idea in three sentences", "Equations and where they are in the code",
                        "Recipe and its paper quotes", "Results", "What goes wrong"]  # fmt: skip


def test_the_tiny_teachers_of_the_recipes_page_are_those_that_there_are() -> None:
    said = re.search(r"real one: NAME is (.*?)\. ", (ROOT / "docs/recipes.md").read_text(), re.S)
    assert said is not None
    assert set(re.findall(r"\w+", said[1].replace("(v-prediction)", ""))) - {"or"} == set(TINY_PIPELINES)


def test_the_readme_says_which_families_have_no_lora_files() -> None:
    said = re.search(r"LoRA files for (.*?) \(Diffusers has no loader", (ROOT / "README.md").read_text(), re.S)
    assert said is not None
    without = {kind.name for kind in map(family_class, FAMILIES) if not kind.supports_lora_loading}
    assert set(re.findall(r"`(\w+)`", said[1])) == without


def test_every_key_of_a_recipe_is_on_the_recipes_page() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    keys = [*Recipe.model_fields, *StageConfig.model_fields, *PlayerConfig.model_fields]
    for name, field in Recipe.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += [key if name in ("data", "stages") else f"{name}.{key}" for key in kind.model_fields]
    assert "bench.evaluator" in keys
    assert "size" in keys
    assert [key for key in keys if f"`{key}`" not in page] == []


def test_no_table_of_results_is_stale_or_still_pending(capsys: pytest.CaptureFixture[str]) -> None:
    assert render_tables.main(["--check"]) == 0, capsys.readouterr().out
    names = [name for document in DOCUMENTS for name in PENDING.findall(document.read_text())]
    measured = [name for name in names if (ROOT / f"benchmarks/results/{name}.json").is_file()]
    assert measured == [], "take the word pending out of these markers and render the tables"


def test_the_matrix_marks_as_tested_what_is_tested_here() -> None:
    text = (ROOT / "README.md").read_text()
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    marked = {(row[0].split("`")[1], i) for row in rows for i, mark in enumerate(row[1:]) if mark != "untested"}
    columns = {("denoising", 1): 0, ("vsd", 1): 1, ("dmd2", 1): 2, ("dmd2", 4): 3}
    tested = {(family, columns[name, len(options.get("timesteps", [999]))]) for family, name, options in TESTED_CELLS}
    assert marked == tested
    assert {row[0].split("`")[3] for row in rows} == set(FAMILIES)


@pytest.mark.parametrize(("family", "objective", "options"), TESTED_CELLS)
def test_a_family_trains_with_an_objective(
    family: str, objective: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("1\n3\n")  # texts to the one, class numbers to the other
    (tmp_path / "images").mkdir()
    size = SIZES.get(family, 16)
    Image.new("RGB", (size, size), (200, 40, 40)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("3")
    content = {
        "name": "tiny", "output": str(tmp_path / "run"), "device": "cpu",
        "teacher": request.getfixturevalue(f"{family}_folder"),
        "data": {"prompts": str(tmp_path / "prompts.txt"), "images": str(tmp_path / "images"), "size": size},
        "stages": [{"objective": {"name": objective, **options}, "steps": 1, "batch_size": 2}],
        "previews": None, "health": {"prompts": 1, "teacher_steps": 2},
        "export": {"pipeline": False, "lora": False},
    }  # fmt: skip
    train(Recipe.from_mapping(content))
    assert '"student/gradient_norm"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_every_public_name_can_be_imported() -> None:
    assert [name for name in stepdistill.__all__ if getattr(stepdistill, name) is None] == []
