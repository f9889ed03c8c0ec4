"""A run of several students, each distilled for its own part of the conditions, and their assembly into one model.

Song et al. 2024, "Multi-student Diffusion Distillation for Better One-step Generators", arXiv 2410.23274.

A student is an ordinary run with `multi_student.part` in its recipe, in a folder of its own. Nothing passes between
students but the partition, so they are trained one after another, or on different machines.

    <output>/student-0, student-1, ...      ordinary runs
    <output>/students.json, partition.*     what `stepdistill.load_students` reads
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.console import Display
from stepdistill.errors import UserError
from stepdistill.run_folder import PARTITION, RECORD, STUDENT, RunFolder


if TYPE_CHECKING:
    from rich.console import Console

    from stepdistill.bench.report import Report
    from stepdistill.data.parts import Part
    from stepdistill.families.base import ModelFamily
    from stepdistill.partition import Partition
    from stepdistill.recipe import Recipe
    from stepdistill.recipe_sections import MultiStudentConfig
    from stepdistill.run import RunResult


CARD = "README.md"
CLASS_TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"  # of DiTTransformer2DModel


@dataclass
class Shared:
    """What the students that one process trains have in common, so that it is computed once.

    Attributes:
        partition: once it is known.
        known: the students of the prompts that were asked for so far.
    """

    partition: Partition | None = None
    known: dict[str, int] = field(default_factory=dict)


def open_part(recipe: Recipe, family: ModelFamily, folder: RunFolder, shared: Shared | None) -> Part | None:
    """What this run's student is responsible for; None if it is the only one.

    The partition is that in the run's folder, else the other students', else it is made from the data.

    Raises:
        UserError: it does not suit the teacher or the data, or the folder's is not the other students'.
    """
    from accelerate import PartialState

    from stepdistill.data.parts import Part
    from stepdistill.partition import Embedder, Router, save_partition

    config, shared = recipe.multi_student, shared or Shared()
    if config is None or config.part is None:
        return None
    partition = _found([folder.path], config, shared.partition) or _fit(recipe, config, family)
    if PartialState().is_main_process:
        save_partition(partition, folder.path)
    shared.partition = partition
    return Part(config.part, config.students, Router(partition, Embedder(family.pipeline), shared.known))


def train_students(recipe: Recipe, *, resume: bool | None, console: Console | None) -> RunResult:
    """Trains all students that are not finished, one after another, and makes one model of them.

    Args:
        recipe: resolved, of all students.
        resume: as for `stepdistill.run.train`; each student goes on where it was stopped.
        console: where progress is shown; None is silent.

    Raises:
        UserError: as `stepdistill.run.train`, or the students were trained for different partitions.
        Interrupted: after SIGINT or SIGTERM; the same command goes on with the student that was in training.
    """
    from stepdistill.processes.launch import open_accelerator
    from stepdistill.run import RunResult, train_one

    config = recipe.multi_student
    assert config is not None, "the caller asks only if the recipe does"
    processes = open_accelerator(recipe)  # says how long the others wait for the first, so before all else
    folder, display = RunFolder(Path(recipe.output)), Display(console)
    students = [student_recipe(recipe, number) for number in range(config.students)]
    folders = [RunFolder(Path(student.output)) for student in students]
    _check(recipe, 0 if resume is False else min(run.stages_done() for run in folders))
    if processes.is_main_process:
        folder.claim(recipe, False if resume is False else None)
    processes.wait_for_everyone()
    if resume and not any(run.stages_done() or run.checkpoints.steps() for run in folders):
        raise UserError(f"{folder.path} holds no checkpoint to resume from; start without --resume")
    shared = Shared(_found([run.path for run in folders], config))
    for number, (student, run) in enumerate(zip(students, folders, strict=True)):
        if is_finished(student, run):
            display.say(f"student {number + 1} of {config.students} is finished")
        else:
            display.say(f"student {number + 1} of {config.students}: {run.path}")
            train_one(student, shared, resume=None, console=console)
        processes.wait_for_everyone()
    if not processes.is_main_process or not recipe.export.pipeline:
        return RunResult(folder.path, None, None, None)
    return _assemble(recipe, config, folder, folders, display)


def student_recipe(recipe: Recipe, number: int) -> Recipe:
    """The ordinary recipe of one of the students; it says the same on whichever machine it is trained."""
    config = recipe.multi_student
    assert config is not None
    return recipe.model_copy(update={
        "output": str(Path(recipe.output) / f"{STUDENT}{number}"),
        "multi_student": config.model_copy(update={"part": number}),
    })  # fmt: skip


def is_finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether a folder holds the finished run of this very recipe, its export included: then nothing is left to do."""
    if not (folder.path / RECORD).is_file() or folder.stages_done() < len(recipe.stages):
        return False
    exported = not recipe.export.pipeline or (folder.pipeline / "model_index.json").is_file()
    # The card is written last: without it the run was stopped before its LoRA, or before its export was checked.
    exported = exported and (folder.path / CARD).is_file()
    return exported and folder.recorded().sha256 == recipe.sha256


def _check(recipe: Recipe, done: int) -> None:
    """Raises UserError where the students could not be trained, of which all have so many stages behind them.

    Or where they could not be put together in the end.
    """
    from stepdistill.stages import build_objectives, check_recipe

    objectives = build_objectives(recipe)
    check_recipe(recipe, objectives, done=done)
    spec = objectives[-1].inference()
    if spec is not None and spec.adapter is not None:
        raise UserError(f"{recipe.where('multi_student')}: students of {recipe.stages[-1].objective.name!r} are "
                        "adapters for any checkpoint, to which nothing routes; leave multi_student away")  # fmt: skip


def _found(
    folders: Sequence[Path], config: MultiStudentConfig, known: Partition | None = None
) -> Partition | None:  # fmt: skip
    """The partition that some of the folders hold, if any; it has to be one in all of them, and the known one.

    Raises:
        UserError: they hold different ones.
    """
    from stepdistill.partition import INDEX, load_partition, same_partition

    for folder in folders:
        if (folder / INDEX).is_file():
            other = load_partition(folder, config.rule)
            if other.students != config.students:
                raise UserError(f"{folder}: the files {PARTITION}* divide prompts among {other.students} students, "
                                f"the recipe among {config.students}; take those files away, or give "
                                f"multi_student.students={other.students}")  # fmt: skip
            known = other if known is None else known
            if not same_partition(other, known):
                raise UserError(f"{folder}: this student was trained for another partition of the prompts than the "
                                "others, so some prompts would be nobody's; train it again, in a folder that "
                                f"holds nothing but the files {PARTITION}* of another student")  # fmt: skip
    return known


def _fit(recipe: Recipe, config: MultiStudentConfig, family: ModelFamily) -> Partition:
    """The partition that a recipe asks for, a function of its data, its seed and its teacher."""
    import numpy as np
    import torch

    from stepdistill.clusters import fit_clusters
    from stepdistill.data.prompts import load_prompts
    from stepdistill.partition import CHUNK, ByClass, ByRule, Embedder

    where, rule, embedder = recipe.where("multi_student"), config.rule, Embedder(family.pipeline)
    if rule is not None:
        return ByRule.named(rule, config.students)
    if config.by not in ("classes", "clusters"):
        raise UserError(f"{where}.by: {config.by!r} is neither classes nor clusters nor a function's "
                        "package.module:name")  # fmt: skip
    if config.by == "classes":
        return ByClass.consecutive(embedder.classes, config.students)
    if embedder.has_classes:
        rows = family.network().get_parameter(CLASS_TABLE)[: embedder.classes].detach().double().cpu()
        features = torch.nn.functional.normalize(rows).numpy()
        costs = fit_clusters(features, config.students, recipe.seed).costs(features)
        return ByClass(config.students, tuple(int(number) for number in costs.argmin(axis=1)))
    texts = list(dict.fromkeys(load_prompts(recipe.data.prompts, count=recipe.data.count).prompts))[: config.sample]
    chunks = [embedder.features(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
    return fit_clusters(np.concatenate(chunks), config.students, recipe.seed)


def _assemble(
    recipe: Recipe, config: MultiStudentConfig, folder: RunFolder, runs: Sequence[RunFolder], display: Display
) -> RunResult:
    """Writes what makes one model of the students, measures it, and describes it."""
    from stepdistill.export.pipeline import FACTS_FILE
    from stepdistill.finish import measure
    from stepdistill.partition import save_partition
    from stepdistill.recipe import build_objective
    from stepdistill.routed import write_students
    from stepdistill.run import RunResult
    from stepdistill.terminal import device_of

    partition = _found([run.path for run in runs], config)
    assert partition is not None, "every student has left it in its folder"
    facts = json.loads((runs[0].pipeline / FACTS_FILE).read_text(encoding="utf-8"))
    facts |= {"students": config.students, "recipe_sha256": recipe.sha256}
    (folder.path / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    save_partition(partition, folder.path)
    write_students(folder.path, [str(run.pipeline.relative_to(folder.path).as_posix()) for run in runs])
    report = None
    if recipe.bench is not None:
        spec = build_objective(recipe.stages[-1].objective, recipe.source).inference()
        report = measure(recipe, spec, folder, display, device_of(recipe.device))
    _write_card(recipe, config, folder, report)
    display.say(f"done: {folder.path}")
    return RunResult(folder.path, folder.path, None, report)


def _write_card(recipe: Recipe, config: MultiStudentConfig, folder: RunFolder, report: Report | None) -> None:
    """README.md: how the students are called together and alone, and what was measured."""
    from stepdistill.export.card import markdown_table
    from stepdistill.recipe import build_objective

    spec = build_objective(recipe.stages[-1].objective, recipe.source).inference()
    call = "" if spec is None else f", num_inference_steps={spec.num_steps}, guidance_scale={spec.guidance_scale:g}"
    rule = f', rule="{config.rule}"' if config.rule else ""
    text = f"""# {recipe.name}

{config.students} students distilled from `{recipe.teacher}`. Each prompt belongs to one of them, by {config.by};
an image costs the network calls of one student.

All of them, with stepdistill installed:

```python
from stepdistill import load_students

pipe = load_students("."{rule})
images = pipe(["a prompt", "another one"]{call}).images
```

One of them, for its own prompts, with nothing but Diffusers:
`DiffusionPipeline.from_pretrained("student-0/pipeline")`.
"""
    if report is not None:
        text += f"\n## Measured\n\n{markdown_table(report.rows)}\n"
    (folder.path / CARD).write_text(text, encoding="utf-8")
