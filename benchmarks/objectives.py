"""The leaderboard: every objective with the same number of network passes.

    python benchmarks/objectives.py                          # every cell that is not measured yet, one after another
    python benchmarks/objectives.py --cells dmd2_plain_1step,sid_1step --passes 400000
    python benchmarks/objectives.py --seeds 0,1,2 --passes 2000000 --device cuda

A cell is a recipe of recipes/shapes and a seed; a later method joins by adding a recipe to CELLS. The passes of an
iteration are counted by a hook while it runs, and the recipe's steps are scaled so that all cells spend the same
number, and with them everything that is counted in iterations: warm-ups, leads, curricula. A cell runs in a process of
its own, resumes where it was stopped, and is skipped once it is measured. The recipes' teachers are measured too.
Results go to benchmarks/results/objectives.json; `render_tables.py` puts them into docs/leaderboard.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from stepdistill import train
from stepdistill.bench import report
from stepdistill.bench.benchmark import Provenance, run_benchmark
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.bench.prompts import ShapesProtocol
from stepdistill.recipe import Recipe, build_objective
from stepdistill.recipe_sections import StageConfig
from stepdistill.run import export
from stepdistill.run_folder import RunFolder


ROOT = Path(__file__).resolve().parents[1]
CELLS = (
    "vsd_1step", "swiftbrush_v2_1step", "esd_1step", "dmd_1step", "dmd2_plain_1step", "dmd2_gan_1step", "dmd2_2step",
    "dmd2_4step", "f_distill_1step", "sid_1step", "sid_4step", "disback_1step", "consistency_1step", "lcm_lora_4step",
    "lcm_4step", "pcm_4step", "tcd_4step", "hyper_lora", "scm_1step", "sprint_1step", "progressive_4step",
    "lightning_4step", "ladd_1step", "add_1step", "multi_student_1step", "small_1step",
    "agd", "guidance_lora", "guidance_embedding",
)  # fmt: skip
# Students that are measured at several numbers of steps, each of which gets a row. LCM's is one for four, and is asked
# for one as well: that is what segmented consistency is compared with (arXiv:2404.13686).
STEPS = {"hyper_lora": (1, 2, 4, 8), "lcm_4step": (1, 4)}
EARLIER = {"progressive_4step": (0, 1)}  # stages before the last whose students get a row too
HYBRIDS = ("dmd2_4step", "lightning_4step")  # students that get a row with their teacher's first step, too
TEACHER = "teacher:"  # in front of a teacher's path: a cell to compare with
TEACHER_STEPS = 25
ITERATIONS = (  # what recipes count in iterations, besides a stage's own steps
    "warmup_steps", "every", "critic_lead", "critic_warmup", "node_steps", "interval", "halving_steps", "weight_steps",
    "conditional_steps",
)  # fmt: skip
SCALED = ("stages", "checkpoints")  # parts of a recipe that have such
# Without checks of health: a run a hundredth as long as its recipe looks ill, and is measured all the same.
QUIET = ("previews=null", "bench=null", "health=null", "checkpoints.keep=1")
GRADIENT_COST = 3  # a pass that is differentiated counts as itself and two more
FORWARD_MODE_COST = 2  # one that carries a derivative along, as itself and one more
MINIATURE = 24  # iterations that a run is shortened to where its iterations are not all alike
# Stored pairs that a cell makes at most: more than it has time to look at are made by its recipe, for a longer run.
PAIRS = 1024
COUNTED_PAIRS = 128  # ... and while its passes are counted, which does not depend on them


@dataclass
class PassCounter:
    """Counts passes of denoising networks, in samples."""

    kind: type[nn.Module]
    passes: int = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook of every module; only whole denoisers count. One that ends early counts whole."""
        if isinstance(module, self.kind):
            differentiated = torch.is_grad_enabled() and (
                inputs[0].requires_grad or any(p.requires_grad for p in module.parameters())
            )
            along = forward_ad.unpack_dual(inputs[0]).tangent is not None
            cost = FORWARD_MODE_COST if along else GRADIENT_COST if differentiated else 1
            self.passes += len(inputs[0]) * cost


@contextmanager
def counting(kind: type[nn.Module]) -> Iterator[PassCounter]:
    """Inside, every pass of a network of this class is counted."""
    counter = PassCounter(kind)
    handle = nn.modules.module.register_module_forward_pre_hook(counter)
    try:
        yield counter
    finally:
        handle.remove()


def passes_per_iteration(recipe: Recipe, folder: Path) -> list[int]:
    """Network passes, in samples, of an iteration of every stage.

    The difference between three iterations and one; between a whole miniature and one, where iterations are not all
    alike.
    """
    from stepdistill.families import load_family

    kind = type(load_family(recipe.teacher).network())
    recipe = with_fewer_pairs(recipe, COUNTED_PAIRS)

    def spent(stages: Sequence[StageConfig]) -> int:
        export = recipe.export.model_copy(update={"pipeline": False, "lora": False})
        short = recipe.model_copy(update={"stages": tuple(stages), "export": export, "output": str(folder)})
        with counting(kind) as counter:
            train(short, resume=False)
        return counter.passes

    ones = [miniature(stage, 1) for stage in recipe.stages]
    least = spent(ones)
    found = []
    for number, stage in enumerate(recipe.stages):
        steps = MINIATURE if varies(stage, recipe) else 3
        longer = [*ones[:number], miniature(stage, steps), *ones[number + 1 :]]
        found.append(round((spent(longer) - least) / (steps - 1)))
    return found


def with_fewer_pairs(recipe: Recipe, count: int) -> Recipe:
    """The recipe with at most so many pairs and prompts, where it makes its pairs itself; as it is, where not."""
    made = recipe.data.make_pairs
    if recipe.data.pairs is not None or made is None:
        return recipe
    fewer = {"count": min(count, recipe.data.count or count),
             "make_pairs": {**made, "count": min(count, made.get("count", count))}}  # fmt: skip
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=fewer)})


def varies(stage: StageConfig, recipe: Recipe) -> bool:
    """Whether a stage's iterations differ in their phases, as where a critic learns alone at first."""
    objective = build_objective(stage.objective, recipe.source)
    return len({tuple(phase.name for phase in objective.phases(i)) for i in range(stage.steps)}) > 1


def miniature(stage: StageConfig, steps: int) -> StageConfig:
    """A stage of so many steps, and with it whatever is counted in iterations."""
    plain = rescaled(stage.model_dump(mode="json"), steps / stage.steps)
    return StageConfig.model_validate({**plain, "steps": steps})


def scaled(recipe: Recipe, per_iteration: Sequence[int], budget: int) -> Recipe:
    """The recipe with all that is counted in iterations scaled by one factor => about `budget` passes."""
    factor = budget / sum(stage.steps * n for stage, n in zip(recipe.stages, per_iteration, strict=True))
    whole = recipe.model_dump(mode="json")
    plain = rescaled({name: whole[name] for name in SCALED}, factor)
    for stage, planned in zip(plain["stages"], recipe.stages, strict=True):
        stage["steps"] = max(1, round(planned.steps * factor))
    changed = Recipe.model_validate({**whole, **plain})
    return recipe.model_copy(update={name: getattr(changed, name) for name in SCALED})


def rescaled(value: Any, factor: float) -> Any:
    """A part of a recipe with the entries of ITERATIONS, wherever they are, multiplied; none becomes 0."""
    if isinstance(value, list):
        return [rescaled(item, factor) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: max(1, round(item * factor)) if key in ITERATIONS and item else rescaled(item, factor)
        for key, item in value.items()
    }


def folder_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a cell keeps its run, its report and its rows."""
    work: Path = args.work
    return work / (name.replace(":", "-").replace("/", "-") if name.startswith(TEACHER) else f"{name}-seed{seed}")


def recipe_of(name: str, overrides: Sequence[str], args: argparse.Namespace) -> Recipe:
    """A cell's recipe, with its own teacher unless the command names another."""
    teacher = [] if args.teacher is None else [f"teacher={args.teacher}"]
    return Recipe.load(ROOT / "recipes/shapes" / f"{name}.yaml", [*QUIET, *teacher, *overrides, *args.override])


def run_cell(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains one cell, measures its exported pipeline, and returns its rows."""
    folder = folder_of(name, seed, args)
    recipe = recipe_of(name, [f"output={folder / 'run'}", f"seed={seed}", f"device={args.device}"], args)
    recipe = with_fewer_pairs(recipe, PAIRS)
    plan = folder / "passes.json"
    if not plan.is_file():
        counts = passes_per_iteration(recipe, folder / "count")
        plan.write_text(json.dumps(counts))
    per_iteration = json.loads(plan.read_text())
    recipe = scaled(recipe, per_iteration, args.passes)
    result = train(recipe)
    earlier = [export(result.folder, f"stage-{n}", folder / f"stage-{n}").pipeline for n in EARLIER.get(name, ())]
    assert result.pipeline or result.adapter, "every cell's recipe exports its pipeline, or is an adapter"
    spec = build_objective(recipe.stages[-1].objective, recipe.source).inference()
    assert spec is not None, "every cell makes a few-step student"
    student = ModelUnderTest(
        name, str(result.pipeline or recipe.teacher), spec.num_steps, spec.guidance_scale, eta=spec.eta,
        adapter=None if result.adapter is None else str(result.adapter),
        train_seconds=RunFolder(result.folder).train_seconds(),
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_memory()
    models = [replace(student, name=f"{name}, {plural(n, 'step')}", steps=n) for n in STEPS.get(name, ())] or [student]
    models += [stage_student(student, recipe, n, path) for n, path in zip(EARLIER.get(name, ()), earlier, strict=True)]
    if name in HYBRIDS:
        models.append(replace(student, name=f"{name}, hybrid", base=recipe.teacher, base_guidance=args.guidance))
    spent = sum(stage.steps * n for stage, n in zip(recipe.stages, per_iteration, strict=True))
    iterations = sum(stage.steps for stage in recipe.stages)
    facts = {"seed": seed, "teacher": recipe.teacher, "iterations": iterations, "passes": spent,
             "training_peak_gib": peak / 2**30}  # fmt: skip
    return [{**row, **facts} for row in measured(models, args, folder / "report", recipe.sha256)]


def plural(count: int, thing: str) -> str:
    """1, "step" => 1 step; 2, "step" => 2 steps."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def stage_student(last: ModelUnderTest, recipe: Recipe, stage: int, path: Path | None) -> ModelUnderTest:
    """The student as an earlier stage left it, called as that stage's objective says."""
    spec = build_objective(recipe.stages[stage].objective, recipe.source).inference()
    assert spec is not None and path is not None, "such a stage makes a few-step student, and its recipe exports it"
    return replace(last, name=f"{last.name}, stage {stage + 1}", path=str(path), steps=spec.num_steps)


def peak_memory() -> int:
    """Largest resident size of this process, in bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def measured(
    models: Sequence[ModelUnderTest], args: argparse.Namespace, folder: Path, sha256: str | None
) -> list[dict[str, Any]]:
    """Rows of the benchmark."""
    protocol = ShapesProtocol(args.prompts, 8)
    found = run_benchmark(models, protocol=protocol, output=folder, device=args.device,
                          provenance=Provenance(models[0].name, sha256))  # fmt: skip
    return [asdict(row) for row in found.rows]


def run_teacher(path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The row to compare with."""
    name = f"{Path(path).name}, {TEACHER_STEPS} guided steps"
    model = ModelUnderTest(name, path, TEACHER_STEPS, args.guidance)
    rows = measured([model], args, folder_of(TEACHER + path, 0, args) / "report", None)
    return [{**row, "seed": 0, "teacher": path} for row in rows]


def collect(args: argparse.Namespace) -> None:
    """Writes what is measured so far: teachers first, then by network calls and FID."""
    files = {path: json.loads(path.read_text()) for path in sorted(args.work.glob("*/rows.json"))}
    rows = [row for found in files.values() for row in found]
    teachers = sorted({row["teacher"] for row in rows})
    rows.sort(key=lambda row: ("passes" in row, row["nfe"], row["fid"]))
    result = {
        "name": "objectives", "date": report.today(), "device": report.device_name(args.device),
        "versions": report.installed_versions(), "seeds": {"runs": sorted({row["seed"] for row in rows})},
        "recipe_sha256": None, "rows": rows,
        "protocol": {"passes": args.passes, "prompts": args.prompts, "teacher": ", ".join(teachers)},
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


def run_in_own_process(name: str, seed: int, arguments: Sequence[str]) -> bool:
    """So that peak memory is the cell's own, and one cell's failure is not the others'."""
    command = [sys.executable, __file__, *arguments, "--one", f"{name}@{seed}"]
    return subprocess.run(command, check=False).returncode == 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS), help="names of recipes in recipes/shapes")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--passes", type=int, default=200_000, help="network passes of one sample, for each cell")
    parser.add_argument("--prompts", type=int, default=256, help="of the benchmark, 8 images each")
    parser.add_argument("--teacher", help="for all cells; default: each recipe's own")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teachers' own rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/leaderboard")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/objectives.json")
    parser.add_argument("--override", action="append", default=[], help="key.path=value for every recipe")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def play(name: str, seed: int, args: argparse.Namespace) -> None:
    """One cell, in this process."""
    path = name.removeprefix(TEACHER)
    rows = run_teacher(path, args) if name != path else run_cell(name, seed, args)
    (folder_of(name, seed, args) / "rows.json").write_text(json.dumps(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of cells that failed."""
    args = parsed(arguments)
    if args.one:
        name, seed = args.one.rsplit("@", 1)
        play(name, int(seed), args)
        return 0
    failed = []
    given = list(arguments if arguments is not None else sys.argv[1:])
    names = args.cells.split(",")
    teachers = dict.fromkeys(recipe_of(name, (), args).teacher for name in names)  # in order, each once
    cells = [(TEACHER + path, 0) for path in teachers]
    cells += [(name, int(seed)) for seed in args.seeds.split(",") for name in names]
    for name, seed in cells:
        folder = folder_of(name, seed, args)
        if not (folder / "rows.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if not run_in_own_process(name, seed, given):
                failed.append(name)
                continue
        collect(args)
    if failed:
        print(f"failed: {', '.join(failed)}; the other cells are in {args.output}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
