"""From a recipe to a folder: load the teacher, play the stages, export the student, measure it.

    recipe => runs/NAME/{recipe.yaml, environment.json, metrics.jsonl, previews, checkpoints, pipeline, lora, report}

Everything here is composition; the loop is in `trainer.py`, the rules are in `objectives/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.assets import resolve_bundled
from stepdistill.console import Display
from stepdistill.errors import UserError
from stepdistill.run_folder import RunFolder


if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from stepdistill.bench.report import Report
    from stepdistill.cast import Cast, RoleState
    from stepdistill.data.batches import Batches
    from stepdistill.data.pairs import PairSet, PairStream
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec, Objective, Phase
    from stepdistill.player import Player
    from stepdistill.recipe import Recipe, StageConfig
    from stepdistill.trainer import Progress, Trainer


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the run's folder.
        pipeline: the exported Diffusers folder, if the recipe asked for one.
        lora: the exported LoRA folder, if any.
        report: what was measured, if the recipe asked for it.
    """

    folder: Path
    pipeline: Path | None
    lora: Path | None
    report: Report | None


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
    recipe = recipe.resolved()
    folder = RunFolder(Path(recipe.output), keep=recipe.checkpoints.keep)
    folder.claim(recipe, resume)
    return _Run(recipe, folder, Display(console)).play()


class _Run:
    """One run in progress."""

    def __init__(self, recipe: Recipe, folder: RunFolder, display: Display) -> None:
        import torch
        from accelerate import Accelerator

        from stepdistill.families import load_family
        from stepdistill.recipe import build_objective

        self.recipe, self.folder, self.display = recipe, folder, display
        self.objectives: list[Objective] = [
            build_objective(stage.objective, recipe.where(f"stages.{index}.objective"))
            for index, stage in enumerate(recipe.stages)
        ]
        for index, (stage, objective) in enumerate(zip(recipe.stages, self.objectives, strict=True)):
            stage.check_roles(trained_roles(objective), recipe.where(f"stages.{index}"))
        if recipe.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"{recipe.where('device')}: cuda was asked for, but torch sees no such device; use auto or cpu"
            )
        precision = {"fp32": "no"}.get(recipe.precision, recipe.precision)
        self.accelerator: Accelerator = Accelerator(mixed_precision=precision, cpu=recipe.device == "cpu")
        display.say(f"loading {recipe.teacher}")
        self.family: ModelFamily = load_family(recipe.teacher, device=str(self.accelerator.device))
        self.batches: Batches | None = None
        self._check_export()

    def play(self) -> RunResult:
        """All stages that are not finished yet, then export, measurement and model card."""
        done = self.folder.stages_done()
        starts = self.folder.load_roles(done - 1) if done else {}
        for index in range(done, len(self.recipe.stages)):
            self.batches = self.batches or open_batches(
                self.recipe, self.objectives, self.family, self.folder,
                accelerator=self.accelerator, display=self.display,
            )  # fmt: skip
            starts = {**starts, **self._play_stage(index, starts)}
            if self.accelerator.is_main_process:
                self.folder.save_roles(index, starts)
        if not self.accelerator.is_main_process:
            return RunResult(self.folder.path, None, None, None)
        return finish(self.recipe, self.family, starts, self.objectives[-1].inference(), self.folder, self.display)

    def _check_export(self) -> None:
        """Raises UserError now, and not after the training, if the student cannot be trained or exported as asked."""
        from stepdistill.cast import roles_with_guidance
        from stepdistill.export.schedulers import family_scheduler
        from stepdistill.times import check_timesteps

        for stage, objective in zip(self.recipe.stages, self.objectives, strict=True):
            roles_with_guidance(self.family, objective.roles(), lora_settings(stage, objective, self.family))
            called = objective.inference()
            check_timesteps(self.family.schedule, () if called is None else called.timesteps)
        wanted = self.recipe.export
        spec = self.objectives[-1].inference()
        if spec is not None and (wanted.pipeline or (wanted.lora and self.family.supports_lora_loading)):
            family_scheduler(self.family, spec)

    def _play_stage(self, index: int, starts: Mapping[str, RoleState]) -> dict[str, RoleState]:
        trainer, cast = self._build_stage(index, starts)
        roles, state = self.folder.newest_checkpoint(stage=index)
        if state is not None:
            trainer.resume(roles, state)
            self.display.say(f"going on from step {trainer.step} of stage {index + 1}")
        self.folder.truncate_log(index, trainer.step)
        with self.display.training(f"stage {index + 1}: {self.recipe.stages[index].objective.name}"):
            trainer.run()
        result = {}
        for name, player in trainer.players.items():
            with player.averaged():
                result[name] = cast.state(name)
        cast.release()
        return result

    def _build_stage(self, index: int, starts: Mapping[str, RoleState]) -> tuple[Trainer, Cast]:
        from stepdistill.cast import Cast
        from stepdistill.trainer import Trainer, TrainerSettings
        from stepdistill.watching import open_monitor

        stage, objective, recipe = self.recipe.stages[index], self.objectives[index], self.recipe
        cast = Cast(
            self.family, objective.roles(), lora=lora_settings(stage, objective, self.family),
            starts=resolve_starts(stage, starts), checkpointing=stage.checkpointing, seed=recipe.seed,
            size=recipe.data.size,
        )  # fmt: skip
        self.display.roles(cast.summary())
        players = {name: build_player(name, cast, stage, objective, self.accelerator) for name in cast.trained}
        assert self.batches is not None, "opened before the first stage"
        settings = TrainerSettings(
            steps=stage.steps, batch_size=stage.batch_size, accumulate=stage.accumulate, seed=recipe.seed,
            checkpoint_every=recipe.checkpoints.every, stage=index,
            first_step=sum(s.steps for s in recipe.stages[:index]),
            **({} if recipe.health is None else {"skips": recipe.health.skips}),
        )  # fmt: skip
        trainer = Trainer(
            cast, objective, players, self.batches, self.accelerator, settings, self.folder.checkpoints,
            self.folder.log, monitor=open_monitor(recipe, stage, objective, cast, self.accelerator),
            on_step=self._on_step(cast, objective, players["student"], settings.first_step),
        )  # fmt: skip
        return trainer, cast

    def _on_step(
        self, cast: Cast, objective: Objective, student: Player, first_step: int
    ) -> Callable[[Progress], None]:
        """What happens after every iteration of a stage: progress is shown, and now and then a picture is made."""
        from stepdistill.watching import open_previews, view_of

        config = self.recipe.previews
        previews = open_previews(self.recipe, self.family, objective.inference(), self.folder)

        def on_step(progress: Progress) -> None:
            self.display.step(progress)
            if previews is None or config is None or not self.accelerator.is_main_process:
                return
            if progress.step == progress.steps or progress.step % config.every == 0:
                with student.averaged():
                    previews.write(
                        cast.denoiser("student"), view_of(cast, objective, "teacher"), first_step + progress.step,
                        critic=view_of(cast, objective, "critic"),
                    )  # fmt: skip

        return on_step


def resolve_starts(stage: StageConfig, before: Mapping[str, RoleState]) -> dict[str, RoleState]:
    """Where a stage's roles start from: "previous" (the default), "teacher", or a Diffusers folder or hub id."""
    from stepdistill.cast import RoleState
    from stepdistill.families import load_family

    starts = dict(before)
    for role, source in stage.starts.items():
        if source == "teacher":
            starts.pop(role, None)
        elif source != "previous":
            network = load_family(source).network()
            starts[role] = RoleState(None, {name: p.detach() for name, p in network.named_parameters()})
    return starts


def trained_roles(objective: Objective) -> list[str]:
    """The roles that an objective trains."""
    from stepdistill.objectives.base import Head, Trained

    return [name for name, role in objective.roles().items() if isinstance(role, Trained | Head)]


def all_phases(stage: StageConfig, objective: Objective) -> Iterator[Phase]:
    """The phases of all iterations of a stage; an objective may change them on the way."""
    for step in range(stage.steps):
        yield from objective.phases(step)


def lora_settings(stage: StageConfig, objective: Objective, family: ModelFamily) -> dict[str, Any]:
    """The adapters' settings of every role that the recipe trains as LoRA; heads have all their weights anyway."""
    from stepdistill.adapters import LoraSettings
    from stepdistill.objectives.base import Trained

    found = {}
    for name, role in objective.roles().items():
        lora = stage.player(name).lora
        if lora is not None and isinstance(role, Trained):
            found[name] = LoraSettings(lora.rank, lora.alpha, tuple(lora.targets or family.lora_targets))
    return found


def build_player(name: str, cast: Cast, stage: StageConfig, objective: Objective, accelerator: Accelerator) -> Player:
    """A role's optimiser and so on, as the recipe says."""
    from stepdistill.player import Player, PlayerSettings
    from stepdistill.recipe import optimizer_class

    config = stage.player(name)
    updates = sum(phase.repeats for phase in all_phases(stage, objective) if name in phase.updates)
    settings = PlayerSettings(
        optimizer=optimizer_class(config.optimizer, f"players.{name}.optimizer"),
        options={"lr": config.optimizer.lr, **config.optimizer.options},
        schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=max(1, updates),
        clip=config.clip, ema=config.ema,
    )  # fmt: skip
    return Player(name, cast.parameters(name), settings, accelerator)


def open_batches(
    recipe: Recipe,
    objectives: Sequence[Objective],
    family: ModelFamily,
    folder: RunFolder,
    *,
    accelerator: Accelerator,
    display: Display,
) -> Batches:
    """Prompts, their encodings, images and pairs, as the recipe says; only the streams that the objectives play."""
    from stepdistill.data.batches import Batches
    from stepdistill.data.cache import ConditionCache, EncodedOnTheFly
    from stepdistill.data.prompts import load_prompts

    data = recipe.data
    played = zip(recipe.stages, objectives, strict=True)
    needs = {phase.stream for stage, objective in played for phase in all_phases(stage, objective)}
    pairs = open_pairs(recipe, family, folder, display) if "pairs" in needs else None
    prompts = load_prompts(data.prompts, count=data.count)
    display.say(prompts.summary())
    cache = ConditionCache(folder.cache, family, prompts) if data.cache and "prompts" in needs else None
    conditions = cache or EncodedOnTheFly(family, prompts)
    with display.counting("encoding prompts") as count:
        conditions.build(count)
    batches = Batches(family, prompts, conditions, None, recipe.seed, accelerator.process_index,
                      accelerator.num_processes, data.size, pairs=pairs)  # fmt: skip
    if data.images is not None and "images" in needs:
        open_images(batches, recipe, folder, display)
    return batches


def open_images(batches: Batches, recipe: Recipe, folder: RunFolder, display: Display) -> None:
    """Gives batches their images stream; with a cache, neither autoencoder nor text encoder works at every step."""
    from stepdistill.data.cache import ConditionCache, EncodedTexts
    from stepdistill.data.images import load_images
    from stepdistill.data.latents import LatentCache, LatentsOnTheFly
    from stepdistill.data.prompts import PromptSet

    data, family = recipe.data, batches.family
    assert data.images is not None, "the caller asks only if the recipe does"
    images = load_images(data.images, size=data.size or family.image_size)
    if not data.cache or data.count is None:
        batches.latents = LatentsOnTheFly(family, images)
        return
    # The number is that of the prompts; a folder may have fewer images.
    latents = LatentCache(folder.cache, family, images, min(data.count, images.length or data.count))
    with display.counting("encoding images") as count:
        latents.build(count)
    captions = PromptSet(tuple(dict.fromkeys(latents.captions)))
    conditions = ConditionCache(folder.cache, family, captions)
    with display.counting("encoding captions") as count:
        conditions.build(count)
    batches.latents, batches.encode = latents, EncodedTexts(conditions, captions)


def open_pairs(recipe: Recipe, family: ModelFamily, folder: RunFolder, display: Display) -> PairStream:
    """The pairs that the recipe names or has made, with their prompts encoded.

    Raises:
        UserError: it does neither, or they are not of its teacher.
    """
    from stepdistill.data.cache import ConditionCache, EncodedOnTheFly
    from stepdistill.data.pairs import PairStream

    pairs = find_pairs(recipe, family, folder, display)
    display.say(pairs.summary())
    cache = ConditionCache(folder.cache, family, pairs.prompts) if recipe.data.cache else None
    conditions = cache or EncodedOnTheFly(family, pairs.prompts)
    with display.counting("encoding the prompts of the pairs") as count:
        conditions.build(count)
    return PairStream(pairs, conditions)


def find_pairs(recipe: Recipe, family: ModelFamily, folder: RunFolder, display: Display) -> PairSet:
    """The stored pairs; where there are none of this teacher, and the recipe says how, the run makes them."""
    from stepdistill.data.pair_maker import PairSettings, make_pairs
    from stepdistill.data.pairs import REMEDY, load_pairs
    from stepdistill.data.prompts import load_prompts
    from stepdistill.options import build_dataclass

    data = recipe.data
    if data.pairs is None and data.make_pairs is None:
        raise UserError(f"{recipe.where('data.pairs')}: missing, and an objective learns from stored pairs; {REMEDY}; "
                        "or say in data.make_pairs how the run is to make them")  # fmt: skip
    if data.pairs is not None:
        try:
            return load_pairs(resolve_bundled(data.pairs), family, size=data.size)
        except UserError as error:
            if data.make_pairs is None:
                raise
            display.say(f"{error}: this run makes its own")
    settings: PairSettings = build_dataclass(PairSettings, recipe.pair_options(), recipe.where("data.make_pairs"))
    prompts, place = load_prompts(data.prompts, count=data.count), folder.cache / "pairs"
    with display.counting("making pairs") as count:
        return make_pairs(family, prompts, place, settings, progress=count)


def finish(
    recipe: Recipe, family: ModelFamily, roles: Mapping[str, RoleState], spec: InferenceSpec | None,
    folder: RunFolder, display: Display,
) -> RunResult:  # fmt: skip
    """Exports the student, checks the export in a fresh process, measures it and writes the model card."""
    from stepdistill.export.card import write_card
    from stepdistill.finish import export_student, measure

    pipeline, lora = export_student(recipe, family, roles["student"], spec, folder, display)
    report = None
    if recipe.bench is not None and pipeline is not None:
        report = measure(recipe, spec, folder, display, str(family.device))
    write_card(folder.path, recipe=recipe.model_dump(mode="json"), spec=spec, report=report,
               picture="report/samples.png" if report is not None else None)  # fmt: skip
    display.say(f"done: {folder.path}")
    return RunResult(folder.path, pipeline, lora, report)


def export(run: Path, checkpoint: str | None = None, output: Path | None = None) -> RunResult:
    """Exports the student of a run again, or of one of its checkpoints.

    Args:
        run: a run's folder.
        checkpoint: "step-0000100" or "100"; None takes the finished student.
        output: where pipeline/ and lora/ go; None: into the run's folder.
    """
    from stepdistill.families import load_family
    from stepdistill.finish import export_student
    from stepdistill.recipe import Recipe, build_objective

    recipe = Recipe.load(run / "recipe.yaml")
    source = RunFolder(run)
    family = load_family(recipe.teacher)
    roles, stage = source.roles_of(checkpoint, recipe, family)
    spec = build_objective(recipe.stages[stage].objective, recipe.source).inference()
    target = RunFolder(output or run)
    pipeline, lora = export_student(recipe, family, roles["student"], spec, target, Display(None))
    return RunResult(target.path, pipeline, lora, None)
