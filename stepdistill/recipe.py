"""A recipe: which teacher, which data, which objectives for how many steps, and what is to come out.

    recipe.yaml => plain mapping => overrides => Recipe => resolved YAML in the run's folder

The models below are the whole vocabulary of a recipe file and, at the same time, the Python API. They are strict: an
unknown or ill-typed key is a :class:`~stepdistill.errors.UserError` of one line that names the file, the key and the
nearest valid name. This module imports neither torch nor any network code, so that reading a recipe costs nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from stepdistill.errors import UserError
from stepdistill.network_shape import NetworkShape
from stepdistill.options import build_named, options_of, plain_options
from stepdistill.recipe_text import apply_override, dump_yaml, explain, nearest, parse_yaml, to_json
from stepdistill.resources.config import Attention, MemoryConfig


if TYPE_CHECKING:
    from stepdistill.objectives.base import Objective


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
Schedule = Literal[
    # The names of diffusers.optimization.get_scheduler, without piecewise_constant, which needs rules of its own.
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
]  # fmt: skip


EXTRAS = ("bitsandbytes", "torchao", "xformers")  # optional packages that a recipe may ask for
NOT_COMPUTED = ("output", "device", "health")  # keys that change nothing about the weights
DATA_NOT_COMPUTED = ("cache_folder", "workers")  # of the data section


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
    starts: Mapping[Text, Text] = Field(default_factory=dict)

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

    prompts: Text
    count: Count | None = None
    images: Text | None = None
    pairs: Text | None = None
    make_pairs: dict[str, Any] | None = None
    cache: bool = True
    cache_folder: Text | None = None
    size: Count | None = None
    buckets: Literal["auto"] | tuple[Text, ...] | None = None
    workers: CountOrZero = 0


class StudentConfig(Section):
    """What the student is beside its teacher: ``shape`` says what its network lacks; null: it is as large."""

    shape: Annotated[NetworkShape, options_of(NetworkShape)] | None = None


class TeacherLora(Section):
    """A LoRA that is merged into the teacher: where it is, and how strongly it counts (1 is as it was trained)."""

    path: Text
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

    ``lora_format`` is how its layers are named: as Diffusers does, as kohya's programs do, or both, a file each.
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
    evaluator: Text = "assets/shapes/clip"


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


class Recipe(Section):
    """A complete description of one run; equal recipes on equal machines give equal weights."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    output: Text = Field(default_factory=lambda known: f"runs/{known.get('name', '')}")
    seed: CountOrZero = 0
    teacher: Text
    teacher_config: Text | None = None
    teacher_loras: tuple[TeacherLora, ...] = ()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Attention = "auto"
    memory: MemoryConfig = MemoryConfig()
    data: DataConfig
    multi_student: MultiStudentConfig | None = None
    student: StudentConfig = StudentConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    checkpoints: CheckpointConfig = CheckpointConfig()
    previews: PreviewConfig | None = PreviewConfig()
    health: HealthConfig | None = HealthConfig()
    export: ExportConfig = ExportConfig()
    bench: BenchConfig | None = None

    _source: str = PrivateAttr(default="recipe")

    def pair_options(self) -> dict[str, Any]:
        """How pairs are made, by the fields of PairSettings; what is not said is sampled as the benchmark does."""
        bench = self.bench
        sampling = {} if bench is None else {"steps": bench.teacher_steps, "guidance": bench.teacher_guidance}
        known = {"seed": self.seed, "precision": self.precision, "size": self.data.size}
        return {**known, **sampling, **(self.data.make_pairs or {})}

    def teacher_options(self) -> dict[str, Any]:
        """What ``stepdistill.load_family`` has to know of the teacher besides where it is."""
        loras = [(lora.path, lora.scale) for lora in self.teacher_loras]
        return {"config": self.teacher_config, "loras": loras}

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a recipe file, or a bundled recipe by its name (``quickstart``), with ``key.path=value`` overrides.

        Raises:
            UserError: The file is missing or no YAML, or a key is unknown, ill-typed or missing; a line a mistake.
        """
        file = find_recipe(path)
        try:
            content = parse_yaml(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from error
        return cls.from_mapping(content, overrides, source=str(file))

    @classmethod
    def from_mapping(cls, content: Any, overrides: Sequence[str] = (), *, source: str = "recipe") -> Self:
        """The recipe that plain values (as YAML gives them) describe; ``source`` is what errors call the file."""
        if not isinstance(content, Mapping):
            raise UserError(f"{source}: expected a mapping with the keys {', '.join(cls.model_fields)}")
        content = json.loads(to_json(content, source))
        overridden = [apply_override(content, text) for text in overrides]
        try:
            recipe = cls.model_validate_json(to_json(content, source), strict=True)
        except ValidationError as error:
            raise UserError("\n".join(explain(error, cls, content, source, overridden=overridden))) from None
        recipe._source = source
        return recipe

    @property
    def source(self) -> str:
        """The file this recipe was read from, as error messages name it."""
        return self._source

    def where(self, key: str) -> str:
        """The place of a key, as error messages name it: ``recipes/x.yaml: stages.0.objective``."""
        return f"{self._source}: {key}"

    def resolved(self) -> Self:
        """The same recipe with the objectives' own defaults written out; checks their options (imports torch)."""
        content = self.model_dump(mode="json")
        for index, stage in enumerate(self.stages):
            objective = build_objective(stage.objective, self.where(f"stages.{index}.objective"))
            content["stages"][index]["objective"] = {"name": stage.objective.name, **plain_options(objective)}
        return self.from_mapping(content, source=self._source)

    def to_yaml(self) -> str:
        """All of the recipe, defaults included, as YAML that :meth:`load` reads back to the same content."""
        return dump_yaml(self.model_dump(mode="json"))

    @property
    def sha256(self) -> str:
        """Fingerprint of what is computed: all content except where it is written, where it runs and who watches."""
        content = self.model_dump(mode="json", exclude={*NOT_COMPUTED})
        for key in DATA_NOT_COMPUTED:
            del content["data"][key]
        # Younger than published results, whose fingerprints shall stay: left out as long as they say nothing.
        younger = [(content, "student", self.student.shape), (content, "multi_student", self.multi_student),
                   (content["data"], "make_pairs", self.data.make_pairs),
                   (content["data"], "buckets", self.data.buckets),
                   (content, "teacher_config", self.teacher_config), (content, "teacher_loras", self.teacher_loras),
                   (content["export"], "lora_format", self.export.lora_format != "diffusers"),
                   (content, "attention", self.attention != "auto"),
                   (content, "memory", self.memory != MemoryConfig())]  # fmt: skip
        for section, key, value in younger:
            if not value:
                del section[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def recipe_folder() -> Path | None:
    """The bundled recipes: in a checkout ``recipes/``, in an installed wheel ``stepdistill/_recipes/``."""
    here = Path(__file__).resolve().parent
    return next((folder for folder in (here / "_recipes", here.parent / "recipes") if folder.is_dir()), None)


def bundled_recipes() -> dict[str, Path]:
    """Bundled recipe files by name, which is the path below the recipes' folder without its suffix."""
    folder = recipe_folder()
    files = sorted(folder.rglob("*.yaml")) if folder else []
    return {str(file.relative_to(folder).with_suffix("").as_posix()): file for file in files if folder}


def find_recipe(path: str | Path) -> Path:
    """The file that is meant by a path or by a bundled recipe's name."""
    file = Path(path)
    if file.is_file():
        return file
    bundled = bundled_recipes()
    name = file.with_suffix("").as_posix().removeprefix("recipes/")
    if name in bundled and not file.is_absolute():
        return bundled[name]
    beside = [str(other) for other in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
    what = "is a folder, not a recipe" if file.is_dir() else "no such recipe"
    raise UserError(f"{path}: {what}; {nearest(str(path), [*beside, *bundled])}")


def build_objective(config: ObjectiveConfig, where: str) -> Objective:
    """The objective that a recipe names, with the options that it gives; errors call its place ``where``."""
    return build_named(config.name, config.options, where)


def check_extra(package: str, what: str) -> None:
    """Raises UserError, with the extra to install, for an optional package of ours that is not there."""
    if package in EXTRAS and importlib.util.find_spec(package) is None:
        raise UserError(f"{what}: needs {package}, which is not installed; pip install 'stepdistill[{package}]'")


def optimizer_class(config: OptimizerConfig, where: str) -> type[Any]:
    """The optimiser that a recipe names, a class of torch.optim or a dotted path; checks the options' names."""
    module, _, name = config.name.rpartition(".")
    try:
        kind: type[Any] = getattr(importlib.import_module(module or "torch.optim"), name)
    except (ImportError, AttributeError):
        kind = type(None)
        check_extra(module.partition(".")[0], f"{where}.name: {config.name}")
    optim = importlib.import_module("torch.optim")
    if not (isinstance(kind, type) and issubclass(kind, optim.Optimizer)):
        known = [word for word in vars(optim) if word[0].isupper()]
        hint = f"{nearest(name, known)} (or give package.module.Class of an installed package)"
        raise UserError(f"{where}.name: unknown optimizer {config.name!r}; {hint}")
    accepted = inspect.signature(kind).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        unknown = [option for option in config.options if option not in accepted]
        if unknown:
            valid = [option for option in accepted if option != "params"]
            raise UserError("\n".join(f"{where}.{key}: unknown key; {nearest(key, valid)}" for key in unknown))
    return kind
