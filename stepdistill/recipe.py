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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError

from stepdistill.errors import UserError
from stepdistill.options import build_named, plain_options
from stepdistill.recipe_sections import (
    BenchConfig,
    CheckpointConfig,
    CountOrZero,
    DataConfig,
    ExportConfig,
    HealthConfig,
    MultiStudentConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Place,
    PreviewConfig,
    Section,
    StageConfig,
    StudentConfig,
    TeacherLora,
)
from stepdistill.recipe_text import apply_override, dump_yaml, explain, nearest, parse_yaml, to_json
from stepdistill.resources.config import Attention, MemoryConfig


if TYPE_CHECKING:
    from stepdistill.objectives.base import Objective


EXTRAS = ("bitsandbytes", "torchao", "xformers")  # optional packages that a recipe may ask for
NOT_COMPUTED = ("output", "device", "health")  # keys that change nothing about the weights
DATA_NOT_COMPUTED = ("cache_folder", "workers")  # of the data section


class Recipe(Section):
    """A complete description of one run; equal recipes on equal machines give equal weights."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    output: Place = Field(default_factory=lambda known: f"runs/{known.get('name', '')}")
    seed: CountOrZero = 0
    teacher: Place
    teacher_config: Place | None = None
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
    with_flow_teacher: dict[str, Any] | None = None

    _source: str = PrivateAttr(default="recipe")
    _overridden: tuple[str, ...] = PrivateAttr(default=())

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
        recipe._source, recipe._overridden = source, tuple(overridden)
        if recipe.with_flow_teacher:
            recipe.for_flow()  # so that its mistakes are found with every teacher
        return recipe

    @property
    def source(self) -> str:
        """The file this recipe was read from, as error messages name it."""
        return self._source

    def where(self, key: str) -> str:
        """The place of a key, as error messages name it: ``recipes/x.yaml: stages.0.objective``."""
        return f"{self._source}: {key}"

    def for_flow(self) -> Self:
        """The recipe for a flow-matching teacher: with what it says of one, except where a command says otherwise."""
        content = {**self.model_dump(mode="json"), "with_flow_teacher": None}
        for key, value in (self.with_flow_teacher or {}).items():
            if not any(f"{key}.".startswith(f"{said}.") or said.startswith(f"{key}.") for said in self._overridden):
                apply_override(content, f"{key}={json.dumps(value)}", what="with_flow_teacher")
        recipe = self.from_mapping(content, source=f"{self._source}, with_flow_teacher")
        recipe._source = self._source
        return recipe

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
                   (content, "with_flow_teacher", self.with_flow_teacher),
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
