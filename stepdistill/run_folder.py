"""The folder of one run: what lies where, whose it is, and how far the run has come."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.files import write_whole, writing


if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.cast import RoleState
    from stepdistill.families.base import ModelFamily
    from stepdistill.recipe import Recipe


RECORD, ENVIRONMENT = "recipe.yaml", "environment.json"  # together the mark of a run
STAGE = "stage-"  # begins the names of folders of what stages ended with
DRAWN = "drawn.json"
STUDENT = "student-"  # begins the names of folders of a run with several students
PARTITION = "partition."  # begins the names of the files that say which prompts are whose


class RunFolder:
    """Names of a run's files, and its small records.

    Args:
        path: the run's folder.
        keep: how many checkpoints are kept.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        from stepdistill.checkpoint import Checkpoints

        self.path = path
        self.log = path / "metrics.jsonl"
        self.previews = path / "previews"
        self.cache = path / "cache"
        self.pipeline = path / "pipeline"
        self.lora = path / "lora"
        self.adapter = path / "adapter"
        self.teacher = path / "teacher"
        self.report = path / "report"
        self.checkpoints = Checkpoints(path / "checkpoints", keep)

    def check(self, recipe: Recipe, resume: bool | None) -> None:
        """Finds out whether `claim` would succeed, and changes nothing.

        Raises:
            UserError: it holds a run of another recipe, or something that is no run; or there is nothing to resume.
        """
        record, mark = self.path / RECORD, self.path / ENVIRONMENT
        welcome = (PARTITION,) if recipe.multi_student is None else (PARTITION, STUDENT)  # these may be trained apart
        if record.is_file() and mark.is_file():  # a recipe alone may be a user's own
            if resume is not False and self._begun():
                self._check_same(recipe)
        elif self.path.exists() and any(not file.name.startswith(welcome) for file in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; choose another folder with output=...")
        if resume and not (self.checkpoints.steps() or self.stages_done()):
            raise UserError(f"{self.path} holds no checkpoint to resume from; start without --resume")

    def claim(self, recipe: Recipe, resume: bool | None) -> None:
        """Makes the folder this recipe's own; False as `resume` deletes the run that it holds.

        Raises:
            UserError: as `check`; or it cannot be written.
        """
        self.check(recipe, resume)
        try:
            if resume is False and ((self.path / RECORD).is_file() or any(self.path.glob(f"{STUDENT}*"))):
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            _record(self.path / RECORD, "#!/usr/bin/env -S stepdistill train\n" + recipe.to_yaml(), mode=0o755)
            _record(self.path / ENVIRONMENT, json.dumps(environment(recipe.device), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); choose another output=...") from error

    def check_exported(self) -> None:
        """Raises UserError where this is a run's folder and another student would replace what it has exported."""
        there = [folder for folder in (self.pipeline, self.lora, self.adapter) if folder.exists()]
        if there and (self.path / RECORD).is_file():
            raise UserError(f"{there[0]}: this run has been exported, and another student would take its place; give "
                            "--output FOLDER, or --replace")  # fmt: skip

    def _begun(self) -> bool:
        """Whether anything was computed here: a recipe whose run failed at once holds nobody up."""
        ended = self.checkpoints.steps() or self._ended()
        return bool(ended) or self.log.is_file() or any(self.path.glob(f"{STUDENT}*"))

    def stages_done(self) -> int:
        """How many whole stages lie behind the run."""
        return 1 + max(self._ended(), default=-1)

    def named(self) -> list[str]:
        """What `roles_of` takes: numbers of checkpoints, and the ends of stages, of which every one is kept."""
        return [*map(str, self.checkpoints.steps()), *(f"{STAGE}{number}" for number in self._ended())]

    def train_seconds(self) -> float:
        """Time spent in iterations, over all sessions of the run and all students that it has."""
        logs = [self.log, *sorted(self.path.glob(f"{STUDENT}*/{self.log.name}"))]
        lines = [line for log in logs if log.is_file() for line in log.read_text().splitlines()]
        return float(sum(json.loads(line)["seconds"] for line in lines if line.endswith("}")))

    def save_roles(self, stage: int, roles: Mapping[str, RoleState], drawn: Mapping[str, int]) -> None:
        """Keeps the weights that a stage ended with, and how many micro-batches were drawn till then, by stream."""
        from stepdistill.checkpoint import save_tree, write_atomically

        tree = {name: {"lora": _lora_tree(state), "tensors": dict(state.tensors)} for name, state in roles.items()}

        def write(target: Path) -> None:
            save_tree(tree, target / "roles")
            (target / DRAWN).write_text(json.dumps(dict(drawn)) + "\n", encoding="utf-8")

        write_atomically(self._stage(stage), write)

    def drawn(self, stage: int) -> dict[str, int]:
        """Micro-batches drawn when a stage had ended, by stream; nothing for runs of versions that did not say it."""
        file = self._stage(stage) / DRAWN
        found: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    def load_roles(self, stage: int) -> dict[str, RoleState]:
        """The weights that a stage ended with."""
        from stepdistill.adapters import LoraSettings
        from stepdistill.cast import RoleState
        from stepdistill.checkpoint import load_tree

        tree = load_tree(self._stage(stage) / "roles")
        return {
            name: RoleState(None if entry["lora"] is None else LoraSettings(**entry["lora"]), entry["tensors"])
            for name, entry in tree.items()
        }

    def newest_checkpoint(self, stage: int) -> tuple[dict[str, dict[str, Tensor]], Any]:
        """=> (weights by role, state), or ({}, None) if there is none of this stage."""
        steps = self.checkpoints.steps()
        if steps:
            roles, state = self.checkpoints.load(steps[-1])
            if state["stage"] == stage:
                return roles, state
        return {}, None

    def truncate_log(self, stage: int, step: int) -> None:
        """Drops what a resumed run is going to log again, and the half line that a killed one may have left.

        Raises:
            UserError: it could not be written; the log is as it was.
        """
        if not self.log.is_file():
            return
        lines = [line for line in self.log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if (lambda e: (e["stage"], e["step"]) <= (stage, step))(json.loads(line))]
        with writing(self.log):
            write_whole(self.log, lambda new: new.write_text("".join(line + "\n" for line in kept)))

    def check_checkpoint(self, checkpoint: str | None, stages: int) -> None:
        """Finds out whether `roles_of` has something to read, for a run of so many stages.

        Raises:
            UserError: there is no such checkpoint, or the run is not finished.
        """
        if checkpoint is None:
            if self.stages_done() < stages:
                raise UserError(f"{self.path} is not finished; run its recipe again, or name one of its checkpoints: "
                                f"{', '.join(self.named()) or 'none yet'}")  # fmt: skip
            return
        number = checkpoint.removeprefix("step-")
        ended = checkpoint.startswith(STAGE) and checkpoint in self.named()
        if not ended and (not number.isdigit() or int(number) not in self.checkpoints.steps()):
            raise UserError(f"{self.path} has no checkpoint {checkpoint!r}; it has "
                            f"{', '.join(self.named()) or 'none'}")  # fmt: skip

    def roles_of(
        self, checkpoint: str | None, recipe: Recipe, family: ModelFamily
    ) -> tuple[dict[str, RoleState], int]:
        """=> (weights by role, number of the stage) of a finished run, of one checkpoint, or of the end of a stage.

        Args:
            checkpoint: "step-0000200", "200", or "stage-0" for the end of the first stage; None: the finished run.
            recipe: of the run.
            family: the teacher.

        Raises:
            UserError: as `check_checkpoint`.
        """
        from stepdistill.cast import RoleState
        from stepdistill.recipe import build_objective
        from stepdistill.stages import lora_settings

        self.check_checkpoint(checkpoint, len(recipe.stages))
        checkpoint = checkpoint or f"{STAGE}{len(recipe.stages) - 1}"
        if checkpoint.startswith(STAGE):
            stage = int(checkpoint.removeprefix(STAGE))
            return self.load_roles(stage), stage
        roles, state = self.checkpoints.load(int(checkpoint.removeprefix("step-")))
        played = recipe.stages[state["stage"]]
        lora = lora_settings(played, build_objective(played.objective, recipe.source), family)
        averages = {name: player["ema"] for name, player in state["players"].items()}
        return {
            name: RoleState(lora.get(name), _averaged(roles[name], average)) for name, average in averages.items()
        }, state["stage"]

    def _stage(self, stage: int) -> Path:
        return self.checkpoints.folder / f"{STAGE}{stage}"

    def _ended(self) -> list[int]:
        """Numbers of the stages that lie behind the run, from 0, rising."""
        return sorted(int(path.name.removeprefix(STAGE)) for path in self.checkpoints.folder.glob(f"{STAGE}*"))

    def recorded(self) -> Recipe:
        """The recipe of the run that is here. An option that is younger than the run has had its default.

        Raises:
            UserError: it cannot be read any more.
        """
        from stepdistill.recipe import Recipe

        return Recipe.load(self.path / RECORD).resolved()

    def _check_same(self, recipe: Recipe) -> None:
        try:
            before = self.recorded()
        except UserError as error:
            raise UserError(f"{self.path} holds a run whose recipe.yaml cannot be read any more ({error}); choose "
                            "another folder with output=..., or start anew with --fresh") from error  # fmt: skip
        if before.sha256 != recipe.sha256:
            keys = ", ".join(_differences(before.model_dump(mode="json"), recipe.model_dump(mode="json"))[:4])
            raise UserError(f"{self.path} holds a run of another recipe (different: {keys}); choose another folder "
                            "with output=..., or start anew with --fresh, which deletes it")  # fmt: skip


def _record(path: Path, text: str, mode: int | None = None) -> None:
    """Writes a small file whole, unless it already says this."""
    if path.is_file() and path.read_bytes() == text.encode():
        return

    def write(new: Path) -> None:
        new.write_text(text, encoding="utf-8")
        if mode is not None:
            new.chmod(mode)

    write_whole(path, write)


def _averaged(tensors: Mapping[str, Tensor], ema: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
    """A checkpoint's weights, or their moving average where one was kept; both are in the same order."""
    if ema is None:
        return tensors
    names: list[str] = ema["names"]
    return {**tensors, **dict(zip(names, ema["shadow_params"], strict=True))}


def _lora_tree(state: RoleState) -> dict[str, Any] | None:
    if state.lora is None:
        return None
    return {"rank": state.lora.rank, "alpha": state.lora.alpha, "targets": state.lora.targets}


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two recipes differ."""
    from stepdistill.recipe import NOT_COMPUTED

    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in [*a, *(k for k in b if k not in a)]:
            if prefix or key not in NOT_COMPUTED:
                found += _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f"{prefix}.{i}")]
    return [] if a == b else [prefix]


def environment(device: str) -> dict[str, Any]:
    """What the run was made with; `device` as the recipe says it."""
    import platform

    import torch

    from stepdistill.bench.report import device_name, installed_versions

    used = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return {"python": platform.python_version(), "platform": platform.platform(), "device": device_name(used),
            "versions": installed_versions(), "arguments": sys.argv[1:]}  # fmt: skip
