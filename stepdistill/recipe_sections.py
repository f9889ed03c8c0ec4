"""The parts of a recipe: every key that a recipe file may have, with its type and its default."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from stepdistill.errors import UserError
from stepdistill.network_shape import NetworkShape
from stepdistill.options import options_of
from stepdistill.recipe_text import nearest


def _number(value: Any) -> Any:
    """Numbers may be written as text: YAML 1.1 reads ``1e-4`` so, and so do shells that quote."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]  # a path that may begin with ~, or the name of something
Schedule = Literal[
    # The names of diffusers.optimization.get_scheduler, without piecewise_constant, which needs rules of its own.
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
]  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: frozen, and every key in it must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class OpenSection(Section):
    """A part whose ``name`` picks a class, and whose other keys are that class's own options."""

    model_config = ConfigDict(extra="allow")

    name: Text

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are the named class's own, as written."""
        return dict(self.model_extra or {})


class ObjectiveConfig(OpenSection):
    """Which distillation game is played; the options are the fields of the objective's dataclass."""


class OptimizerConfig(OpenSection):
    """Which optimiser a role is trained with: a class of torch.optim or a dotted path, and its keyword arguments."""

    name: Text = "AdamW"
    lr: Positive = 1e-4


class LoraConfig(Section):
    """A low-rank adapter; ``alpha`` is the rank where it is not given, ``targets`` the family's where null."""

    rank: Count = 32
    alpha: Positive = Field(default_factory=lambda known: float(known.get("rank", 32)))
    targets: tuple[Text, ...] | None = None


class LoraWeights(Section):
    """A role that trains an adapter on the frozen network: ``{lora: {rank: 32}}``."""

    lora: LoraConfig


class PlayerConfig(Section):
    """How one trained role learns: weights, optimiser, learning-rate schedule, clipping, moving average."""

    weights: Literal["full"] | LoraWeights = "full"
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = "constant"
    warmup_steps: CountOrZero = 0
    clip: Positive | None = 1.0
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter that is trained, or None where all weights are."""
        return None if isinstance(self.weights, str) else self.weights.lora

    def over(self, default: PlayerConfig) -> PlayerConfig:
        """What this player says, and for everything that it does not say, what ``default`` says."""
        below, above = (player.model_dump(mode="json", exclude_unset=True) for player in (default, self))
        own, shared = above.get("optimizer", {}), below.get("optimizer", {})
        if own.get("name", shared.get("name", "AdamW")) != shared.get("name", "AdamW"):
            below["optimizer"] = {"lr": shared["lr"]} if "lr" in shared else {}  # other options are the other class's
        return PlayerConfig.model_validate(_merge(below, above))


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


class StageConfig(Section):
    """One stage: an objective, how long it is played, and how its roles are trained."""

    objective: ObjectiveConfig
    steps: Count
    batch_size: Count = 32
    accumulate: Count = 1
    checkpointing: bool = False
    players: Mapping[Text, PlayerConfig] = Field(default_factory=dict)
    starts: Mapping[Text, Place] = Field(default_factory=dict)

    @field_validator("players")
    @classmethod
    def _fill_in(cls, players: Mapping[str, PlayerConfig]) -> Mapping[str, PlayerConfig]:
        default = players.get("default", PlayerConfig())
        filled = {"default": default, **{role: p.over(default) for role, p in players.items() if role != "default"}}
        for role, player in filled.items():
            if player.schedule == "constant" and player.warmup_steps:
                text = "{role}: schedule 'constant' has no warm-up; use 'constant_with_warmup' or warmup_steps: 0"
                raise PydanticCustomError("warmup", text, {"role": role})
        return filled

    def player(self, role: str) -> PlayerConfig:
        """How ``role`` is trained: its own entry, or the one called ``default``."""
        return self.players.get(role, self.players["default"])

    def check_roles(self, roles: Collection[str], where: str) -> None:
        """Raises UserError when ``players`` or ``starts`` names a role that the objective does not train."""
        for key, named, known in (("players", self.players, ["default", *roles]), ("starts", self.starts, [*roles])):
            for role in named:
                if role not in known:
                    raise UserError(f"{where}.{key}.{role}: unknown role; {nearest(role, known)}")


class DataConfig(Section):
    """Where prompts come from and, for stages that learn from data, images and stored pairs.

    ``make_pairs`` says how pairs are made (as ``stepdistill.data.pair_maker.PairSettings``): those that ``stepdistill
    data pairs`` stores, and those that a run makes in its own folder where ``pairs`` has none of its teacher.
    ``cache_folder`` is one that ``stepdistill data cache`` has made; ``buckets`` are sizes of images, width x height.
    """

    prompts: Place
    count: Count | None = None
    images: Place | None = None
    pairs: Place | None = None
    make_pairs: dict[str, Any] | None = None
    cache: bool = True
    cache_folder: Place | None = None
    size: Count | None = None
    buckets: Literal["auto"] | tuple[Text, ...] | None = None
    workers: CountOrZero = 0


class StudentConfig(Section):
    """What the student is beside its teacher: ``shape`` says what its network lacks; null: it is as large."""

    shape: Annotated[NetworkShape, options_of(NetworkShape)] | None = None


class TeacherLora(Section):
    """A LoRA that is merged into the teacher: where it is, and how strongly it counts (1 is as it was trained)."""

    path: Place
    scale: Number = 1.0


class CheckpointConfig(Section):
    """How often the run is saved, in steps, and how many of these are kept."""

    every: Count = 500
    keep: Count = 2


class PreviewConfig(Section):
    """How often sample grids are written, in steps, and of which prompts (a count takes the data's first ones)."""

    every: Count = 500
    prompts: Count | tuple[Text, ...] = 8
    seed: CountOrZero = 0


class HealthConfig(Section):
    """How the student is watched, and what stops the run: as in ``stepdistill.health.HealthSettings``, and ``skips``.

    ``skips`` is how many iterations in a row may have an update left out because it was not finite.
    """

    every: Count = 100
    prompts: Count = 4
    samples: Annotated[int, Field(ge=2)] = 2
    seed: CountOrZero = 0
    teacher_steps: Count = 25
    grace: CountOrZero = 200
    patience: Count = 3
    skips: CountOrZero = 3
    min_contrast: NotNegative | None = 0.05
    min_diversity: NotNegative | None = 0.02
    max_scale: Positive | None = 10.0
    max_drift: Positive | None = 0.3
    max_critic_ratio: Positive | None = 4.0


class ExportConfig(Section):
    """What is left behind: a Diffusers pipeline, a LoRA file (of full weights: by truncated SVD at this rank).

    ``lora_format`` is how its layers are named: as Diffusers does, as kohya's programs do (of Stable Diffusion 1.x and
    2.x by Diffusers' names of the blocks, of SDXL by those of its own code), or both, a file each.
    """

    pipeline: bool = True
    lora: bool = True
    lora_rank: Count = 32
    lora_format: Literal["diffusers", "kohya", "both"] = "diffusers"


class BenchConfig(Section):
    """The benchmark at the end of a run: protocol sizes, and how the teacher is sampled to compare with."""

    prompts: Count = 64
    images_per_prompt: Count = 8
    seed: CountOrZero = 0
    batch_size: Count = 64
    teacher_steps: Count = 25
    teacher_guidance: NotNegative = 3.0
    evaluator: Place = "assets/shapes/clip"


class MultiStudentConfig(Section):
    """Several students, each for a part of the conditions: ``by`` clusters, classes or ``package.module:function``."""

    students: Count
    by: Text = "clusters"
    sample: Count = 8192
    part: CountOrZero | None = None

    @field_validator("part")
    @classmethod
    def _exists(cls, part: int | None, known: ValidationInfo) -> int | None:
        students = known.data.get("students", 1)
        if part is not None and part >= students:
            raise PydanticCustomError("part", "there are students 0 to {last}", {"last": students - 1})
        return part

    @property
    def rule(self) -> str | None:
        """The function that divides the prompts, if one does."""
        return self.by if ":" in self.by else None
