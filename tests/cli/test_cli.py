"""The command line: what it prints, how it fails, and that help costs nothing.

`python -m tests.cli.test_cli --update` writes docs/cli.txt anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stepdistill import cli
from stepdistill.errors import UserError
from stepdistill.recipe import Recipe
from stepdistill.recipe_text import parse_yaml


ROOT = Path(__file__).resolve().parents[2]
HELP_FILE = ROOT / "docs" / "cli.txt"
FACTS_FILE = "distillation_config.json"
COMMANDS = (
    "train", "sample", "bench", "bench prepare", "export", "merge",
    "data", "data check", "data cache", "data pairs", "compare", "inspect", "plan", "doctor", "list",
)  # fmt: skip

RECIPE = """\
name: tiny
teacher: some/folder
data: {prompts: shapes}
stages:
  - objective: {name: dmd2, guidance: 3.0}
    steps: 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stepdistill.run that only remembers its calls."""
    calls: list[dict[str, Any]] = []

    def train(recipe: Recipe, *, resume: bool | None, console: Any) -> None:
        calls.append({"recipe": recipe, "resume": resume, "quiet": console.quiet})

    def export(run_folder: Path, checkpoint: str | None, output: Path | None, *, replace: bool) -> Any:
        calls.append({"run_folder": run_folder, "checkpoint": checkpoint, "output": output, "replace": replace})
        return types.SimpleNamespace(pipeline=(output or run_folder) / "pipeline", lora=None, adapter=None)

    module = types.ModuleType("stepdistill.run")
    module.__dict__.update(train=train, export=export)
    monkeypatch.setitem(sys.modules, "stepdistill.run", module)
    return calls


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs the command as a shell would, in this process, and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["stepdistill", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_train_hands_over_the_recipe_with_its_overrides(
    recipe: Path, fake_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "train", recipe, "stages.0.steps=3", "--fresh", "output=a=b", "--quiet") == 0
    (made,) = fake_run
    assert (made["recipe"].stages[0].steps, made["recipe"].output) == (3, "a=b")
    assert made["resume"] is False
    assert made["quiet"] is True


@pytest.mark.parametrize(("flags", "resume"), [([], None), (["--resume"], True), (["--fresh"], False)])
def test_train_tells_resuming_from_beginning_anew_from_neither(
    recipe: Path,
    fake_run: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    resume: bool | None,
) -> None:
    assert call(monkeypatch, "train", recipe, *flags) == 0
    assert fake_run[0]["resume"] is resume


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages.0.steps", "10"], "'stages.0.steps' is not key.path=value; did you mean stages.0.steps=10?"),
        (["seed=1", "device"], "'device' is not key.path=value; did you mean device=VALUE?"),
        (["other.yaml"], "'other.yaml' is a second recipe; train one after the other"),
        (["resume"], "'resume' is not key.path=value; did you mean --resume?"),
        (["stages.0.stepz=10"], "override stages.0.stepz: unknown key; did you mean 'steps'?"),
    ],
)
def test_what_follows_a_recipe_and_is_no_override_is_told_as_one_line(
    recipe: Path, fake_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    assert call(monkeypatch, "train", recipe, *words) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {message}\n"
    assert printed.out == ""
    assert fake_run == []


def test_an_override_before_the_recipe_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "seed=1", "recipes/quickstart.yaml") == 2
    assert "the recipe comes first: stepdistill train RECIPE seed=1" in capsys.readouterr().err


def test_every_mistake_in_a_recipe_is_a_line_of_its_own_and_no_traceback(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE + "    batch_sise: 1\nsead: 3\n", encoding="utf-8")
    assert call(monkeypatch, "train", recipe) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [
        f"error: {recipe}: sead: unknown key; did you mean 'seed'?",
        f"error: {recipe}: stages.0.batch_sise: unknown key; did you mean 'batch_size'?",
    ]


def test_dry_run_prints_the_complete_recipe_and_runs_nothing(
    recipe: Path, fake_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", recipe, "--dry-run", "seed=7") == 0
    printed = parse_yaml(capsys.readouterr().out, "printed")
    assert printed["seed"] == 7
    assert printed["stages"][0]["objective"]["critic_updates"] == 5, "the objective's own defaults are shown"
    assert printed["stages"][0]["players"]["default"]["optimizer"]["lr"] == 1e-4
    assert fake_run == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.objective.guidence=2", "stages.0.objective.guidence: unknown key; did you mean 'guidance'?"),
        ("stages.0.objective={name: lcm}", "data.images: missing, and stages.0 (lcm) learns from images;"),
        ("stages.0.players={default: {optimizer: {name: AdaW}}}", "optimizer.name: unknown optimizer 'AdaW';"),
    ],
)
def test_dry_run_checks_objectives_optimisers_and_data(
    override: str, message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", recipe, "--dry-run", override) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (Path("checkpoints/step-0000002"), "interrupted: checkpoint left at checkpoints/step-0000002;"),
        (None, "interrupted: no checkpoint was written, the run was in doubt;"),
    ],
)
def test_ctrl_c_is_exit_code_130_without_a_traceback_and_says_what_was_saved(
    recipe: Path, saved: Path | None, told: str,
    fake_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from stepdistill.trainer import Interrupted

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise Interrupted(2, saved)

    monkeypatch.setattr(sys.modules["stepdistill.run"], "train", interrupted)
    assert call(monkeypatch, "train", recipe) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(told)


def test_other_errors_keep_their_traceback(
    recipe: Path, fake_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a defect of ours")

    monkeypatch.setattr(sys.modules["stepdistill.run"], "train", broken)
    monkeypatch.setattr(sys, "argv", ["stepdistill", "train", str(recipe)])
    with pytest.raises(ValueError, match="a defect of ours"):
        cli.main()


def test_export_hands_over_run_checkpoint_and_output(
    recipe: Path, fake_run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.rename(recipe.with_name("recipe.yaml")).parent
    assert call(monkeypatch, "export", run, "--checkpoint", "step-20", "--output", run / "new") == 0
    assert fake_run == [{"run_folder": run, "checkpoint": "step-20", "output": run / "new", "replace": False}]
    assert capsys.readouterr().out.strip() == str(run / "new/pipeline")
    assert call(monkeypatch, "export", run, "--replace") == 0
    assert fake_run[1] == {"run_folder": run, "checkpoint": None, "output": None, "replace": True}


def test_export_of_a_folder_without_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "export", tmp_path) == 2
    assert "no run in this folder" in capsys.readouterr().err


def facts(folder: Path, **values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS_FILE).write_text(json.dumps(values), encoding="utf-8")


def test_a_run_is_called_the_way_its_export_says(tmp_path: Path) -> None:
    facts(tmp_path / "run/pipeline", steps=4, guidance_scale=1.0)
    (tmp_path / "run/pipeline/model_index.json").write_text("{}", encoding="utf-8")
    model = cli._parse_model(f"{tmp_path}/run")
    assert (model.path, model.steps, model.guidance_scale) == (str(tmp_path / "run/pipeline"), 4, 1.0)
    assert model.name == "run"


@pytest.mark.parametrize(
    ("export", "made", "message"),
    [
        ("{}", ["checkpoints/step-0000004", "checkpoints/step-0000020"],
         "this run has no pipeline yet; stepdistill export RUN --checkpoint 20"),
        ("{}", ["checkpoints/stage-0"], "this run has no pipeline yet; stepdistill export RUN --checkpoint stage-0"),
        ("{}", [], "this run has no pipeline and no checkpoint yet; give its train command again"),
        ("{pipeline: false}", ["lora"], "call its LoRA RUN/lora on some/folder, or set it to true in RUN/recipe.yaml"),
        ("{pipeline: false}", [], "export.pipeline: false; set it to true in RUN/recipe.yaml, then: stepdistill"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [["sample", "RUN", "a"], ["bench", "RUN"]])
def test_a_run_without_a_pipeline_says_how_it_gets_one(
    command: list[str], export: str, made: list[str], message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = recipe.parent / "run"
    for name in made:
        (run / name).mkdir(parents=True)
        (run / name / "state.json").write_text("{}")
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(f"{RECIPE}export: {export}\n")
    words = [word.replace("RUN", str(run)) for word in command]
    assert call(monkeypatch, *words, "--output", str(recipe.parent / "out")) == 2
    assert message.replace("RUN", str(run)) in capsys.readouterr().err


def test_a_model_that_says_nothing_is_called_like_a_teacher() -> None:
    model = cli._parse_model("some/hub-id")
    assert (model.path, model.steps, model.guidance_scale) == ("some/hub-id", cli.PLAIN_STEPS, cli.PLAIN_GUIDANCE)


def test_a_lora_brings_its_steps_and_its_scheduler(tmp_path: Path) -> None:
    facts(tmp_path / "lora", steps=1, guidance_scale=1.0)
    (tmp_path / "lora/scheduler").mkdir()
    model = cli._parse_model(f"teacher,lora={tmp_path}/lora")
    assert (model.steps, model.scheduler) == (1, str(tmp_path / "lora/scheduler"))


def test_what_a_user_says_about_a_model_wins() -> None:
    model = cli._parse_model("teacher,steps=8,guidance_scale=2,scheduler=dpm++,name=fast teacher")
    assert (model.name, model.steps, model.guidance_scale, model.scheduler) == ("fast teacher", 8, 2.0, "dpm++")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher,stepz=8", "model teacher.stepz: unknown key; did you mean 'steps'?"),
        ("teacher,steps=ten", "model teacher.steps: expected an integer, got 'ten'"),
        ("teacher,8", "'8' is not key=value, for example teacher,steps=4"),
    ],
)
def test_a_mistake_in_how_a_model_is_called_names_the_key(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cli._parse_model(text)
    assert message in str(caught.value)


def test_broken_facts_name_the_file(tmp_path: Path) -> None:
    (tmp_path / FACTS_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=f"{FACTS_FILE}: cannot be read"):
        cli._parse_model(str(tmp_path))


class FakePipeline:
    """Draws one-coloured images whose shade is the first number of each generator."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: list[str], **options: Any) -> Any:
        import torch
        from PIL import Image

        self.calls.append({"prompt": prompt, **options})
        shades = [int(torch.randint(256, (1,), generator=generator)) for generator in options["generator"]]
        return types.SimpleNamespace(images=[Image.new("L", (4, 4), shade) for shade in shades])


def test_sample_writes_an_image_for_every_prompt_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = FakePipeline()
    monkeypatch.setattr("stepdistill.bench.generate.load_pipeline", lambda model, *, device: pipeline)
    facts(tmp_path / "model", steps=2, guidance_scale=1.0)
    words = ["sample", tmp_path / "model", "A red circle!", "blue", "--count", "2", "--output", tmp_path / "out"]
    assert call(monkeypatch, *words, "--seed", "3") == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ["000-a-red-circle-3-0.png", "000-a-red-circle-3-1.png", "001-blue-3-0.png", "001-blue-3-1.png"]
    assert [file.name for file in files] == names
    assert len({file.read_bytes() for file in files}) == 4, "every image has noise of its own"
    assert [(c["num_inference_steps"], c["guidance_scale"]) for c in pipeline.calls] == [(2, 1.0), (2, 1.0)]
    assert call(monkeypatch, *words, "--seed", "3", "--steps", "7", "--guidance-scale", "2.5") == 0
    assert (pipeline.calls[-1]["num_inference_steps"], pipeline.calls[-1]["guidance_scale"]) == (7, 2.5)


def test_bench_measures_the_models_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stepdistill.bench.benchmark import Progress

    seen: dict[str, Any] = {}

    def run_benchmark(models: Any, *, on_progress: Any, **options: Any) -> Any:
        on_progress(Progress("real images", 1, 2))
        seen.update(options, models=models)
        return types.SimpleNamespace(to_table=lambda: "the table")

    monkeypatch.setattr("stepdistill.bench.benchmark.run_benchmark", run_benchmark)
    words = ["bench", "a,steps=1", "b", "--prompts", "4", "--images-per-prompt", "2", "--output", tmp_path]
    assert call(monkeypatch, *words) == 0
    assert [(model.name, model.steps) for model in seen["models"]] == [("a", 1), ("b", cli.PLAIN_STEPS)]
    assert (seen["protocol"].prompts, seen["protocol"].images_per_prompt, seen["output"]) == (4, 2, tmp_path)
    out = capsys.readouterr().out
    assert "the table" in out and str(tmp_path / "report.md") in out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["one", "teacher"], "aaa"),
        (["one,steps=2,name=x", "teacher,lora=one/lora", "teacher+one/file.safetensors"], "aaa"),
        (["one", "two"], None), (["one", "older"], None), (["teacher"], None),
    ],
)  # fmt: skip
def test_a_report_knows_the_recipe_if_all_students_are_of_one(
    words: list[str], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, known in (("one", {"recipe_sha256": "aaa"}), ("two", {"recipe_sha256": "bbb"}), ("older", {"seed": 0})):
        for part in ("pipeline", "lora"):
            facts(tmp_path / run / part, steps=1, guidance_scale=1.0, **known)
        (tmp_path / run / "pipeline/model_index.json").write_text("{}")
    (tmp_path / "one/file.safetensors").write_text("")
    facts(tmp_path / "one", steps=1, guidance_scale=1.0, recipe_sha256="aaa")
    (tmp_path / "teacher").mkdir()
    seen: dict[str, Any] = {}

    def run_benchmark(models: Any, **options: Any) -> Any:
        seen.update(options)
        return types.SimpleNamespace(to_table=lambda: "the table")

    monkeypatch.setattr("stepdistill.bench.benchmark.run_benchmark", run_benchmark)
    assert call(monkeypatch, "bench", *words) == 0
    assert seen["provenance"].recipe_sha256 == found


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("objectives", ["dmd2", "vsd", "denoising", "critic_updates"]),
        ("recipes", ["quickstart", "shapes/dmd2_1step"]),
        ("families", ["StableDiffusionPipeline", "DiTPipeline"]),
        ("protocols", ["shapes"]),
    ],
)
def test_list_shows_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], topic: str, words: list[str]
) -> None:
    assert call(monkeypatch, "list", topic) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_list_without_a_topic_shows_all_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list") == 0
    out = capsys.readouterr().out
    assert all(topic.value in out for topic in cli.Topic)


def test_an_objective_that_cannot_be_imported_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stepdistill import objectives

    monkeypatch.setitem(objectives.OBJECTIVES, "broken", "no_such_package:Thing")
    assert call(monkeypatch, "list", "objectives") == 0
    out = capsys.readouterr().out
    assert "broken" in out and "dmd2" in out


def test_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"stepdistill {importlib.metadata.version('stepdistill')}\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_and_version_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['stepdistill', *sys.argv[1:]]\n"
        "from stepdistill.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistake_in_a_recipe_is_found_without_importing_torch(recipe: Path) -> None:
    code = (
        "import sys; from stepdistill.recipe import Recipe\n"
        "Recipe.load(sys.argv[1]).to_yaml()\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_within_the_time_that_the_design_allows() -> None:
    def seconds() -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stepdistill", "--help"], capture_output=True, check=True)
        return time.perf_counter() - begun

    assert min(seconds() for _ in range(3)) <= 0.6, "the fastest of three, since other work may share the machine"


def captured_help() -> str:
    """The help of every command, as a terminal of 80 columns without colour shows it."""
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"})
    parts = [
        f"Captured with typer {importlib.metadata.version('typer')} by `python -m tests.cli.test_cli --update`.\n"
    ]
    for words in ([], *(command.split() for command in COMMANDS)):
        shown = runner.invoke(cli.app, [*words, "--help"], prog_name="stepdistill", color=False)
        assert shown.exit_code == 0, shown.output
        lines = [line.rstrip() for line in shown.output.strip().splitlines()]
        parts.append("\n".join([f"$ {' '.join(['stepdistill', *words, '--help'])}", *lines]) + "\n")
    return "\n".join(parts)


def test_the_help_that_the_documentation_shows_is_the_help() -> None:
    written, now = HELP_FILE.read_text(encoding="utf-8"), captured_help()
    if written.splitlines()[0] == now.splitlines()[0]:
        assert written == now, "run: python -m tests.cli.test_cli --update"
    # Another version of typer lays help out in another way, so that only the options can be compared.
    assert options_in(written) == options_in(now), "run: python -m tests.cli.test_cli --update"


def options_in(text: str) -> set[tuple[str, str]]:
    """Every option, with the command it belongs to."""
    found, command = set(), ""
    for line in text.splitlines():
        command = line if line.startswith("$ ") else command
        found |= {(command, word) for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line) if command != line}
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    HELP_FILE.parent.mkdir(exist_ok=True)
    HELP_FILE.write_text(captured_help(), encoding="utf-8")
