"""What the commands understand by a model: a few words => how that model is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepdistill.errors import UserError
from stepdistill.guidance import ADAPTER_FILE, HEADER


if TYPE_CHECKING:
    from stepdistill.bench.generate import ModelUnderTest

PLAIN_STEPS, PLAIN_GUIDANCE = 25, 3.0  # for models that do not say how they want to be called, such as teachers
HeightOption = Annotated[int | None, typer.Option(min=1, help="Of the images, in pixels. Default: the model's own.")]
WidthOption = Annotated[int | None, typer.Option(min=1, help="The same.")]
OF_BASE = ("base_replaces", "base_steps", "base_guidance")
COMMA = re.compile(r",(?![^\[]*\])")  # one that is not within brackets


def parse_model(text: str) -> ModelUnderTest:
    """``path,key=value,...`` => how that model is called; defaults come from its folder.

    Raises:
        UserError: what cannot be understood, or stands for several models.
    """
    models = parse_models(text)
    if len(models) > 1:
        raise UserError(f"model {text!r}: stands for {len(models)} models, here one is wanted")
    return models[0]


def parse_models(
    text: str, nfe: Sequence[int] = (), common: Mapping[str, Any] = MappingProxyType({})
) -> list[ModelUnderTest]:
    """``[name=]path[+file][,key=value,...]`` => how that model is called, once for each cell that it stands for.

    ``+file`` puts a LoRA or a guidance adapter on the model. ``nfe=[1,2,4]`` calls it at several numbers of network
    calls, ``scheduler=[dpm++,unipc]`` through several schedulers.

    Args:
        text: as above.
        nfe: numbers of network calls for a model that does not say how many steps it wants.
        common: keys of all models, for those that do not say otherwise.

    Raises:
        UserError: what cannot be understood.
    """
    name, path, given = _words(text)
    calls, schedulers = given.pop("nfe", None), given.get("scheduler")
    if isinstance(schedulers, list):
        given["scheduler"] = None
    path, addon = _addon(path)
    model = model_under_test(path, {**common, **addon, **({"name": name} if name else {}), **given})
    models = [model]
    if isinstance(schedulers, list):
        models = [replace(model, name=f"{model.name} ({word})", scheduler=str(word)) for word in schedulers]
    if calls is None and nfe and "steps" not in given and not _says_steps(model):
        calls = list(nfe)
    return models if calls is None else [cell for model in models for cell in _cells(model, calls, text)]


def model_under_test(model: str, given: dict[str, Any]) -> ModelUnderTest:
    """How a model is called: as given, else as its distillation_config.json says, else like a teacher.

    Raises:
        UserError: an unknown or ill-typed key, or a run that has not exported anything.
    """
    from stepdistill.bench.generate import ModelUnderTest
    from stepdistill.options import build_dataclass

    folder = Path(model)
    path = folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder
    if (folder / "adapter").is_dir() and not given.get("adapter"):  # a run whose student is a guidance adapter
        given = {**given, "adapter": str(folder / "adapter")}
        path = facts_of(folder / "adapter").get("teacher", path)
    if path == folder:
        _check_run(folder)
    options: dict[str, Any] = {
        "name": folder.name, "path": str(path) if folder.exists() else model, "steps": PLAIN_STEPS,
        "guidance_scale": PLAIN_GUIDANCE,
    }  # fmt: skip
    home = _home(str(given["lora"])) if given.get("lora") else Path(path)
    # An adapter has a guidance scale, and leaves all else to the LoRA or the pipeline that it is put on.
    beside = facts_of(Path(given["adapter"])) if given.get("adapter") else {}
    own = facts_of(home)
    told = {key: beside[key] for key in ("guidance_scale",) if key in beside}
    facts = {**beside, **own, **told}
    options |= {key: facts[key] for key in ("steps", "guidance_scale", "eta") if key in facts}
    given = {key: value for key, value in given.items() if value is not None}
    _check_base(model, given)
    if given.get("lora") and (home / "scheduler").is_dir():
        options["scheduler"] = str(home / "scheduler")
    elif given.get("lora") and not own:
        options |= _known_call({**told, **given})
    options |= given
    if isinstance(options.get("timesteps"), list):
        options["steps"] = len(options["timesteps"])
    tested: ModelUnderTest = build_dataclass(ModelUnderTest, options, f"model {model}")
    return tested


def _check_base(model: str, given: Mapping[str, Any]) -> None:
    """Raises UserError for what is said of a base that there is not."""
    alone = [] if "base" in given else [key for key in OF_BASE if key in given]
    if alone:
        raise UserError(f"model {model}: {alone[0]} does nothing without a base; add --base MODEL, in a list of "
                        "models base=MODEL")  # fmt: skip


def _check_run(folder: Path) -> None:
    """Raises UserError, with what to do, where a run's folder holds nothing that can be called."""
    from stepdistill.recipe import Recipe
    from stepdistill.routed import is_routed
    from stepdistill.run_folder import RunFolder

    file = folder / "recipe.yaml"
    if not file.is_file() or (folder / "model_index.json").is_file() or is_routed(folder):
        return
    recipe = Recipe.load(file)
    if recipe.multi_student is not None and recipe.multi_student.part is None:
        raise UserError(f"{folder}: not all of this run's students are trained; give its train command again, or one "
                        f"of them, such as {folder}/student-0")  # fmt: skip
    if not recipe.export.pipeline:
        beside = f"call its LoRA {folder}/lora on {recipe.teacher}, or " if (folder / "lora").is_dir() else ""
        raise UserError(f"{folder}: this run has no pipeline, since its recipe has export.pipeline: false; {beside}"
                        f"set it to true in {file}, then: stepdistill export {folder}")  # fmt: skip
    names = RunFolder(folder).named()
    if not names:
        raise UserError(f"{folder}: this run has no pipeline and no checkpoint yet; give its train command again")
    steps = [name for name in names if name.isdigit()] or names
    raise UserError(f"{folder}: this run has no pipeline yet; stepdistill export {folder} --checkpoint {steps[-1]}")


def recipe_hash(models: Sequence[ModelUnderTest]) -> str | None:
    """The hash of the recipe that made all students among models; None where they are of several, or of none."""
    found = set()
    for model in models:
        places = [Path(model.path), *([_home(model.lora)] if model.lora else [])]
        places += [Path(model.adapter)] if model.adapter else []
        found |= {facts.get("recipe_sha256") for facts in map(facts_of, places) if facts}
    (only,) = found if len(found) == 1 else (None,)
    return only if isinstance(only, str) else None


def _home(lora: str) -> Path:
    """Where the facts of a LoRA lie: its folder, or that of its file."""
    place = Path(lora)
    return place.parent if place.is_file() else place


def _known_call(given: Mapping[str, Any]) -> dict[str, Any]:
    """How a LoRA that brings no facts is called: as its makers say if its name is known, and the user is told."""
    from stepdistill.inspection.lora_calls import lora_call

    if {"steps", "guidance_scale", "scheduler"} <= given.keys():
        return {}
    name, call = given.get("name", given["lora"]), lora_call(str(given["lora"]))
    remedy = "give steps, guidance_scale and scheduler if it wants to be called otherwise"
    if call is None:
        if "guidance_scale" not in given:
            typer.echo(f"warning: {name}: neither a distillation_config.json beside {given['lora']} nor its name says "
                       f"how it is called; guidance_scale={PLAIN_GUIDANCE:g}, {PLAIN_STEPS} steps and the base's "
                       f"scheduler are taken; {remedy}", err=True)  # fmt: skip
        return {}
    options = call.options
    if "steps" in given:  # timesteps are for as many steps as there are
        options.pop("timesteps", None)
    used = {key: value for key, value in options.items() if key not in given}
    words = ", ".join(f"{key}={value}" for key, value in used.items())
    typer.echo(f"note: {name}: {words}, since {call.because} {remedy.capitalize()}", err=True)
    return used


def facts_of(folder: Path) -> dict[str, Any]:
    """What a folder's distillation_config.json says; nothing where there is none.

    Raises:
        UserError: the file is broken.
    """
    import json

    from stepdistill.export.pipeline import FACTS_FILE

    file = folder / FACTS_FILE
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export the model again") from error
    return facts if isinstance(facts, dict) else {}


def _words(text: str) -> tuple[str | None, str, dict[str, Any]]:
    """=> name, if one is given, path, and what stands behind the commas."""
    from stepdistill.recipe_text import key_and_value, parse_yaml

    path, *pairs = COMMA.split(text)
    name = None
    if "=" in path and not Path(path).exists():
        name, _, path = path.partition("=")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, value = key_and_value(pair, f"model {text!r}: {pair!r}", f"key=value, for example {path},steps=4")
        options[key] = parse_yaml(value, f"model {text!r}: {key}")
    return name, path, options


def _addon(path: str) -> tuple[str, dict[str, str]]:
    """``base+file`` => base, and what the file is; a path that has a plus in it is itself."""
    base, plus, file = path.partition("+")
    if not plus or Path(path).exists():
        return path, {}
    return base, {"adapter" if _is_adapter(Path(file)) else "lora": file}


def _is_adapter(path: Path) -> bool:
    if path.is_dir():
        return (path / ADAPTER_FILE).is_file()
    if not path.is_file():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return HEADER in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False  # which whoever loads it will say


def _says_steps(model: ModelUnderTest) -> bool:
    from stepdistill.inspection.lora_calls import lora_call

    if model.timesteps is not None:
        return True
    places = [Path(model.path)] + ([_home(model.lora)] if model.lora else [])
    if any("steps" in facts_of(place) for place in places):
        return True
    known = lora_call(model.lora) if model.lora else None
    return known is not None and known.fixed


def _cells(model: ModelUnderTest, calls: Any, text: str) -> list[ModelUnderTest]:
    from stepdistill.bench.models import at_nfe

    numbers = calls if isinstance(calls, list) else [calls]
    if not numbers or not all(type(count) is int and count > 0 for count in numbers):
        raise UserError(f"model {text!r}: nfe is a list of numbers of network calls, such as nfe=[1,2,4]")
    found, odd = at_nfe(model, numbers)
    if not found:
        raise UserError(f"model {text!r}: guidance doubles every call, so it cannot make an odd number of them; give "
                        "an even one, or guidance_scale=1")  # fmt: skip
    if odd:
        typer.echo(f"warning: {model.name}: not measured at {', '.join(map(str, odd))} network calls: guidance "
                   "doubles every call, so their number is even", err=True)  # fmt: skip
    return found
