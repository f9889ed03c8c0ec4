"""`--smoke`: any recipe from its first step to its export in a minute, on a tiny teacher of random weights.

What is tried is the recipe itself: its objectives with their options, its roles and weights, its stages, its export.
What costs time is replaced: the teacher by the tiny one of its family, data by a few texts and pictures, and numbers
of steps and samples by small ones. Nothing is measured, since there is nothing to see.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.console import Display
from stepdistill.errors import UserError, first_line
from stepdistill.small_options import small_objective, small_pairs


if TYPE_CHECKING:
    from rich.console import Console

    from stepdistill.recipe import Recipe

STEPS, BATCH, PROMPTS, PAIRS = 2, 2, 8, 8
SIDE = 512  # pixels of the pictures: the largest size of a tiny teacher, since smaller pictures would be left out
TINY = "tiny:"
# words in names of well-known checkpoints => family; the first that fits counts
NAMES = (
    (r"pixart.*sigma", "pixart_sigma"), (r"pixart", "pixart"), (r"sana", "sana"), (r"flux", "flux"),
    (r"\bdit\b|dit-", "dit"), (r"stable-diffusion-3|sd-?3", "sd3"), (r"xl", "sdxl"),
    # Of Stable Diffusion 2 the 768-pixel models predict v, those called base and turbo epsilon.
    (r"stable-diffusion-2.*base|sd-?2.*base|turbo", "sd"), (r"stable-diffusion-2|sd-?2", "sd21"),
    (r"stable-diffusion|\bsd-?v?1|dreamshaper", "sd"),
)  # fmt: skip
UNMEASURED = ("min_contrast", "min_diversity", "max_scale", "max_drift", "max_critic_ratio")


def run_smoke(recipe: Recipe, *, console: Console | None = None) -> None:
    """Runs a recipe in small, in a temporary folder that is gone afterwards.

    Args:
        recipe: what is to be tried.
        console: where progress is shown; None is silent.

    Raises:
        UserError: the recipe has a mistake, or its teacher's family is not known or has no tiny teacher.
    """
    from stepdistill.run import train

    with tempfile.TemporaryDirectory(prefix="stepdistill-smoke-") as temporary:
        small = smoke_recipe(recipe, Path(temporary))
        train(small, console=console)
    Display(console).say(f"{recipe.name}: works from its beginning to its end, on {small.teacher}")


def smoke_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The small recipe; writes the data that it needs, a few texts and pictures, to a folder.

    Raises:
        UserError: as `run_smoke`.
    """
    from stepdistill.teacher_kind import for_teacher

    name = family_of(recipe)
    recipe = recipe.model_copy(update={"teacher": TINY + name, "teacher_config": None, "teacher_loras": ()})
    recipe = for_teacher(recipe)
    content = recipe.model_dump(mode="json")
    content |= {"output": str(folder / "run"), "bench": None, "checkpoints": {"every": 1, "keep": 1}}
    content["data"] |= _small_data(recipe, name == "dit", folder)
    content["stages"] = [_small_stage(stage) for stage in content["stages"]]
    if content["previews"] is not None:
        content["previews"] |= {"every": STEPS, "prompts": 2}
    if content["health"] is not None:
        content["health"] |= {"every": STEPS, "prompts": 2, "samples": 2, "teacher_steps": 2,
                              **dict.fromkeys(UNMEASURED)}  # fmt: skip
    content["export"]["lora_rank"] = min(4, recipe.export.lora_rank)
    if content["multi_student"] is not None:
        students, part = min(2, content["multi_student"]["students"]), content["multi_student"]["part"]
        part = None if part is None else min(part, students - 1)
        content["multi_student"] |= {"students": students, "sample": PROMPTS, "part": part}
    if content["student"]["shape"] is not None:
        # Numbers of layers and names of parts are those of the real network.
        content["student"]["shape"] = {"channels": 0.5}
    return type(recipe).from_mapping(content, source=recipe.source)


def _small_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    small = {**stage, "objective": small_objective(stage["objective"]), "steps": STEPS,
             "batch_size": min(BATCH, stage["batch_size"])}  # fmt: skip
    small["accumulate"] = min(2, stage["accumulate"])
    small["players"] = {role: {**p, "warmup_steps": min(1, p["warmup_steps"])} for role, p in stage["players"].items()}
    small["starts"] = {role: start if start in ("previous", "teacher") else "teacher"
                       for role, start in stage["starts"].items()}  # fmt: skip
    return small


def _small_data(recipe: Recipe, classes: bool, folder: Path) -> dict[str, Any]:
    """Texts, and pictures and pairs where the recipe has them."""
    from PIL import Image

    # Letters, since tiny tokenizers know no words.
    texts = [str(i) if classes else chr(ord("a") + i) * (i % 3 + 1) for i in range(PROMPTS)]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(texts) + "\n", encoding="utf-8")
    # Buckets are sizes of the real network, and what was prepared is of its encoders.
    data: dict[str, Any] = {"prompts": str(prompts), "count": PROMPTS, "size": None, "buckets": None,
                            "cache_folder": None}  # fmt: skip
    if recipe.data.images is not None:
        images = folder / "images"
        images.mkdir()
        for number, text in enumerate(texts):
            shade = 255 * number // PROMPTS
            Image.new("RGB", (SIDE, SIDE), (shade, 255 - shade, 128)).save(images / f"{number}.png")
            (images / f"{number}.txt").write_text(text, encoding="utf-8")
        data["images"] = str(images)
    if recipe.data.pairs is not None or recipe.data.make_pairs is not None:
        data |= {"pairs": None, "make_pairs": _small_pairs(recipe.data.make_pairs)}
    return data


def _small_pairs(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a few pairs are made; in place of stored ones, with all that an objective may want of the way."""
    small = small_pairs(options or {"states": "all", "predictions": True})
    return {**small, "count": PAIRS, "size": None, "precision": "fp32"}


def family_of(recipe: Recipe) -> str:
    """The name of the tiny teacher that stands for a recipe's teacher.

    Raises:
        UserError: it is neither here nor known by its name, or its family has no tiny teacher.
    """
    from stepdistill.families.tiny import TINY_PIPELINES

    teacher = recipe.teacher
    if teacher.startswith(TINY):
        return teacher.removeprefix(TINY)
    lowered = Path(teacher).name.lower()
    name = _family_by_files(recipe) or next((name for words, name in NAMES if re.search(words, lowered)), None)
    if name not in TINY_PIPELINES:
        known = "is not known" if name is None else f"is {name}, which has no tiny teacher"
        raise UserError(f"--smoke: the family of the teacher {teacher} {known}; say which tiny one stands for it: "
                        f"teacher={TINY}NAME, of {', '.join(TINY_PIPELINES)}")  # fmt: skip
    return name


def _family_by_files(recipe: Recipe) -> str | None:
    """What the teacher's own files say, as far as they are on this machine; nothing is downloaded."""
    from stepdistill.assets import resolve_bundled
    from stepdistill.families import FAMILIES, family_class

    place = Path(resolve_bundled(recipe.teacher_config or recipe.teacher))
    index, scheduler = (_local_file(place, name) for name in ("model_index.json", "scheduler/scheduler_config.json"))
    if index is None:
        return None
    kind = _read(index).get("_class_name")
    name = family_class(kind).name if kind in FAMILIES else None
    predicts = {} if scheduler is None else _read(scheduler)
    if name == "sd" and predicts.get("prediction_type") == "v_prediction":
        return "sd21"
    return name


def _read(file: Path) -> Mapping[str, Any]:
    import json

    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--smoke: {file} is damaged ({first_line(error)}); copy or download it again") from error
    return content


def _local_file(place: Path, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if place.is_dir():
        return place / name if (place / name).is_file() else None
    try:
        found = try_to_load_from_cache(str(place), name)
    except ValueError:  # no hub id either
        return None
    return Path(found) if isinstance(found, str) else None
