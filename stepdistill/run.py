"""From a recipe to a folder: load the teacher, play the stages, export the student, measure it.

    recipe => runs/NAME/{recipe.yaml, environment.json, metrics.jsonl, previews, checkpoints, pipeline, lora, report}

Everything here is composition; the loop is in `trainer.py`, the rules are in `objectives/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.console import Display
from stepdistill.errors import UserError
from stepdistill.run_folder import STAGE, RunFolder
from stepdistill.stages import build_objectives, check_recipe, lora_settings, optimizer_options
from stepdistill.streams import all_phases, open_batches
from stepdistill.teacher_kind import resolve


if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from stepdistill.bench.report import Report
    from stepdistill.cast import Cast, RoleState
    from stepdistill.data.batches import Batches
    from stepdistill.data.parts import Part
    from stepdistill.families.base import ModelFamily
    from stepdistill.multi_student import Shared
    from stepdistill.objectives.base import InferenceSpec, Objective
    from stepdistill.player import Player
    from stepdistill.recipe import Recipe
    from stepdistill.recipe_sections import StageConfig
    from stepdistill.trainer import Progress, Trainer


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the run's folder.
        pipeline: the exported Diffusers folder, if the recipe asked for one.
        lora: the exported LoRA folder, if any.
        report: what was measured, if the recipe asked for it.
        adapter: the exported guidance adapter's folder, if the student is one.
    """

    folder: Path
    pipeline: Path | None
    lora: Path | None
    report: Report | None
    adapter: Path | None = None


def train(recipe: Recipe, *, resume: bool | None = None, console: Console | None = None) -> RunResult:
    """Runs a recipe from start to end, or goes on where an interrupted run of the same recipe stopped.

    Args:
        recipe: what to do.
        resume: True demands a checkpoint to go on from, False starts anew (deletes the old run), None goes on if there
            is one.
        console: where progress is shown; None is silent.

    Raises:
        UserError: the recipe does not fit the teacher, the folder holds another run, the disk is full ...
        Interrupted: after SIGINT or SIGTERM; the same command goes on from the checkpoint.
    """
    recipe = resolve(recipe)
    if recipe.multi_student is not None and recipe.multi_student.part is None:
        from stepdistill.multi_student import train_students

        return train_students(recipe, resume=resume, console=console)
    return train_one(recipe, None, resume=resume, console=console)


def train_one(recipe: Recipe, shared: Shared | None, *, resume: bool | None, console: Console | None) -> RunResult:
    """As `train`, of a resolved recipe of one student; `shared` is what students of one process have in common."""
    from stepdistill.processes.launch import open_accelerator

    folder = RunFolder(Path(recipe.output), keep=recipe.checkpoints.keep)
    accelerator = open_accelerator(recipe)
    if accelerator.is_main_process:
        folder.check(recipe, resume)
    check_recipe(recipe, build_objectives(recipe), done=0 if resume is False else folder.stages_done())
    run = _Run(recipe, folder, Display(console), accelerator)
    if accelerator.is_main_process:
        folder.claim(recipe, resume)  # only now: a mistake in the recipe costs nobody a run
    accelerator.wait_for_everyone()
    return run.play(shared)


class _Run:
    """One run in progress."""

    def __init__(self, recipe: Recipe, folder: RunFolder, display: Display, accelerator: Accelerator) -> None:
        from stepdistill.processes.launch import open_sharding, shares
        from stepdistill.resources.apply import open_teacher

        self.recipe, self.folder, self.display = recipe, folder, display
        self.objectives = build_objectives(recipe)
        self.accelerator = accelerator
        self.sharding = open_sharding(accelerator)
        self.shares = shares(recipe, accelerator.num_processes, sharded=self.sharding is not None)
        display.say(f"loading {recipe.teacher}")
        self.family: ModelFamily = open_teacher(recipe, str(self.accelerator.device))
        self.batches: Batches | None = None
        self.part: Part | None = None
        self._check_export()

    def play(self, shared: Shared | None) -> RunResult:
        """All stages that are not finished yet, then export, measurement and model card."""
        from stepdistill.multi_student import open_part
        from stepdistill.small_students import describe

        self.part = open_part(self.recipe, self.family, self.folder, shared)

        shape = self.recipe.student.shape
        if shape is not None:
            self.display.say(describe(self.family, shape, self.recipe.data.size))
        done = self.folder.stages_done()
        starts = self.folder.load_roles(done - 1) if done else {}
        for index in range(done, len(self.recipe.stages)):
            if self.batches is None:
                with self.accelerator.main_process_first():  # the others find on disk what it has encoded
                    self.batches = open_batches(
                        self.recipe, self.objectives, self.family, self.folder,
                        accelerator=self.accelerator, display=self.display, part=self.part,
                    )  # fmt: skip
                self.batches.restore(self.folder.drawn(done - 1) if done else {})
            starts = {**starts, **self._play_stage(index, starts)}
            if self.accelerator.is_main_process:
                self.folder.save_roles(index, starts, self.batches.drawn)
        if not self.accelerator.is_main_process:
            return RunResult(self.folder.path, None, None, None)
        self._load_plainly()
        return finish(self.recipe, self.family, starts, self.objectives[-1].inference(), self.folder, self.display,
                      device=str(self.accelerator.device))  # fmt: skip

    def _load_plainly(self) -> None:
        """Exports are made from the teacher's own weights, and not from how they were kept to save memory.

        On the CPU: beside the teacher there are then the student and, of a LoRA, its merged copies, all in float32,
        for which a device that had to save memory has no room.
        """
        from stepdistill.families import load_family
        from stepdistill.resources.config import MemoryConfig

        if self.recipe.memory != MemoryConfig():
            self.batches = None  # holds the former teacher
            del self.family
            self.family = load_family(self.recipe.teacher, device="cpu", **self.recipe.teacher_options())
            self.family.at_size(self.recipe.data.size)

    def _check_export(self) -> None:
        """Raises UserError now, and not after the training, if the student cannot be trained or exported as asked."""
        from stepdistill.cast import adapter_roles, roles_with_guidance, shapes_of_roles
        from stepdistill.export.lora import check_format
        from stepdistill.export.schedulers import family_scheduler
        from stepdistill.guidance.wiring import wiring_of
        from stepdistill.objectives.base import NeedsSchedule
        from stepdistill.resources.apply import check_roles
        from stepdistill.small_students import shaped_roles
        from stepdistill.times import check_timesteps

        for stage, objective in zip(self.recipe.stages, self.objectives, strict=True):
            roles = shaped_roles(objective, self.recipe.student.shape)
            lora = lora_settings(stage, objective, self.family)
            check_roles(roles, lora, self.recipe.memory, self.recipe.where("memory.base"))
            roles_with_guidance(self.family, roles, lora)
            shapes_of_roles(self.family, roles, lora)
            if adapter_roles(roles, lora):
                wiring_of(self.family.network())  # refuses
            called = objective.inference()
            check_timesteps(self.family.schedule, () if called is None else called.timesteps)
            if isinstance(objective, NeedsSchedule):
                objective.check_schedule(self.family.schedule)
        wanted = self.recipe.export
        spec = self.objectives[-1].inference()
        if spec is not None and (wanted.pipeline or (wanted.lora and self.family.supports_lora_loading)):
            family_scheduler(self.family, spec)
        if wanted.lora:
            check_format(self.family, wanted.lora_format)

    def _play_stage(self, index: int, starts: Mapping[str, RoleState]) -> dict[str, RoleState]:
        from stepdistill.resources.apply import settings_of

        trainer, cast = self._build_stage(index, starts)
        roles, state = self.folder.newest_checkpoint(stage=index)
        if state is not None:
            trainer.resume(roles, state)
            self.display.say(f"going on from step {trainer.step} of stage {index + 1}")
        if self.accelerator.is_main_process:
            self.folder.truncate_log(index, trainer.step)
        title = f"stage {index + 1}: {self.recipe.stages[index].objective.name}"
        with self.display.training(title), settings_of(self.recipe):
            trainer.run()
        result = {}
        for name, player in trainer.players.items():
            with player.averaged():
                result[name] = cast.state(name)
        cast.release()
        return result

    def _build_stage(self, index: int, starts: Mapping[str, RoleState]) -> tuple[Trainer, Cast]:
        from stepdistill.cast import Cast
        from stepdistill.resources.apply import prepare_cast
        from stepdistill.resources.offload import offload_states
        from stepdistill.small_students import shaped_roles
        from stepdistill.trainer import Trainer, TrainerSettings
        from stepdistill.watching import open_monitor

        stage, objective, recipe = self.recipe.stages[index], self.objectives[index], self.recipe
        cast = Cast(
            self.family, shaped_roles(objective, recipe.student.shape),
            lora=lora_settings(stage, objective, self.family), starts=resolve_starts(stage, starts, self.family),
            checkpointing=stage.checkpointing, seed=recipe.seed, size=recipe.data.size, sharding=self.sharding,
        )  # fmt: skip
        self.display.roles(cast.summary())
        seen = prepare_cast(cast, recipe)
        if seen:
            self.display.say(f"attention: {', '.join(f'{kind} in {count} layers' for kind, count in seen.items())}")
        where = recipe.where(f"stages.{index}")
        players = {name: build_player(name, cast, stage, objective, self.accelerator, where) for name in cast.trained}
        if recipe.memory.offload_optimizer:
            for player in players.values():
                offload_states(player.optimizer)
        assert self.batches is not None, "opened before the first stage"
        settings = TrainerSettings(
            steps=stage.steps, **vars(self.shares[index]), seed=recipe.seed,
            checkpoint_every=recipe.checkpoints.every, stage=index,
            first_step=sum(s.steps for s in recipe.stages[:index]),
            **({} if recipe.health is None else {"skips": recipe.health.skips}),
        )  # fmt: skip
        trainer = Trainer(
            cast, objective, players, self.batches, self.accelerator, settings, self.folder.checkpoints,
            self.folder.log, monitor=open_monitor(recipe, stage, objective, cast, self.accelerator, self.part),
            on_step=self._on_step(cast, objective, players["student"], index, settings.first_step),
        )  # fmt: skip
        return trainer, cast

    def _on_step(
        self, cast: Cast, objective: Objective, student: Player, stage: int, first_step: int
    ) -> Callable[[Progress], None]:
        """What happens after every iteration of a stage: progress is shown, and now and then a picture is made."""
        from stepdistill.trainer import NO_CACHE
        from stepdistill.watching import open_previews, view_of

        config, draws = self.recipe.previews, self.accelerator.is_main_process or cast.divided
        previews = open_previews(self.recipe, self.family, objective, self.folder, self.part,
                                 self.recipe.stages[stage].batch_size)  # fmt: skip
        if previews is not None and not self.accelerator.is_main_process:
            previews.folder = None

        def on_step(progress: Progress) -> None:
            self.display.step(progress)
            if previews is None or config is None or not draws:
                return
            if progress.step == progress.steps or progress.step % config.every == 0:
                # As in training: weights in half precision do not take samples in float32 otherwise.
                with student.averaged(), self.accelerator.autocast(NO_CACHE):
                    previews.write(
                        cast.denoiser("student"), view_of(cast, objective, "teacher"), first_step + progress.step,
                        critic=view_of(cast, objective, "critic"),
                    )  # fmt: skip

        return on_step


def resolve_starts(stage: StageConfig, before: Mapping[str, RoleState], family: ModelFamily) -> dict[str, RoleState]:
    """Where a stage's roles start from: "previous" (the default), "teacher", or whatever a teacher could be.

    Raises:
        UserError: a network predicts another quantity than the family's, so that as one of it, it would draw nothing.
    """
    from stepdistill.cast import RoleState
    from stepdistill.families import load_family

    starts = dict(before)
    for role, source in stage.starts.items():
        if source == "teacher":
            starts.pop(role, None)
        elif source != "previous":
            start = load_family(source)
            if start.kind != family.kind:
                raise UserError(f"starts.{role}: {source} predicts {start.kind}, the teacher {family.path} "
                                f"{family.kind}; begin with a network that predicts what the teacher does, or take "
                                "another teacher")  # fmt: skip
            starts[role] = RoleState(None, {name: p.detach() for name, p in start.network().named_parameters()})
    return starts


def build_player(
    name: str, cast: Cast, stage: StageConfig, objective: Objective, accelerator: Accelerator, where: str = "stage"
) -> Player:
    """A role's optimiser and so on, as the recipe says; `where` is the stage's place in it, for errors."""
    from stepdistill.player import Player, PlayerSettings
    from stepdistill.recipe import optimizer_class

    config = stage.player(name)
    updates = sum(phase.repeats for phase in all_phases(stage, objective) if name in phase.updates)
    place = f"{where}.players.{name}.optimizer"
    settings = PlayerSettings(
        optimizer=optimizer_class(config.optimizer, place), options=optimizer_options(config.optimizer), where=place,
        schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=max(1, updates),
        clip=config.clip, ema=config.ema,
    )  # fmt: skip
    return Player(name, cast.parameters(name), settings, accelerator)


def finish(
    recipe: Recipe, family: ModelFamily, roles: Mapping[str, RoleState], spec: InferenceSpec | None,
    folder: RunFolder, display: Display, *, device: str,
) -> RunResult:  # fmt: skip
    """Exports the student, checks the export in a fresh process, measures it on `device`, writes the model card."""
    from stepdistill.export.card import write_card
    from stepdistill.finish import export_student, keep_teacher, known_teacher, measure

    pipeline, lora = export_student(recipe, family, roles["student"], spec, folder, display)
    adapter = folder.adapter if spec is not None and spec.adapter is not None else None
    report = None
    # One of several students is measured with the others: alone it knows its own prompts only.
    if recipe.bench is not None:
        keep_teacher(family, folder)
    if recipe.bench is not None and recipe.multi_student is None and (pipeline is not None or adapter is not None):
        report = measure(recipe, spec, folder, display, device)
    described = {**recipe.model_dump(mode="json"), "teacher": known_teacher(recipe, folder)}
    write_card(folder.path, recipe=described, spec=spec, report=report,
               picture="report/samples.png" if report is not None else None)  # fmt: skip
    display.say(f"done: {folder.path}")
    return RunResult(folder.path, pipeline, lora, report, adapter)


def export(
    run: Path, checkpoint: str | None = None, output: Path | None = None, *, replace: bool = False
) -> RunResult:
    """Exports the student of a run again, of one of its checkpoints, or of the end of one of its stages.

    Args:
        run: a run's folder.
        checkpoint: "step-0000100" or "100"; "stage-0" for the end of the first stage; None takes the finished student.
        output: where pipeline/ and lora/ go; None: into the run's folder.
        replace: also where a run has been exported there, and this is not its finished student.

    Raises:
        UserError: there is no such checkpoint, the run is not finished, or it would replace a run's own export.
    """
    from stepdistill.families import load_family
    from stepdistill.finish import export_student
    from stepdistill.recipe import Recipe, build_objective

    recipe = Recipe.load(run / "recipe.yaml")
    if recipe.multi_student is not None and recipe.multi_student.part is None:
        raise UserError(f"{run}: a run of several students, which are exported one by one: give {run}/student-0")
    source, target = RunFolder(run), RunFolder(output or run)
    source.check_checkpoint(checkpoint, len(recipe.stages))
    finished = checkpoint in (None, f"{STAGE}{len(recipe.stages) - 1}")
    if not replace and not (finished and target.path.resolve() == run.resolve()):
        target.check_exported()
    family = load_family(recipe.teacher, **recipe.teacher_options())
    family.at_size(recipe.data.size)
    roles, stage = source.roles_of(checkpoint, recipe, family)
    spec = build_objective(recipe.stages[stage].objective, recipe.source).inference()
    pipeline, lora = export_student(recipe, family, roles["student"], spec, target, Display(None), stage=stage)
    adapter = target.adapter if spec is not None and spec.adapter is not None else None
    return RunResult(target.path, pipeline, lora, None, adapter)
