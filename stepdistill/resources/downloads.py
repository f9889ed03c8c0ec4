"""Which files a recipe would download, and how large they are; asks the hub for names and sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.errors import first_line


if TYPE_CHECKING:
    from stepdistill.recipe import Recipe

PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")  # what loading a Diffusers folder without pickles reads


@dataclass(frozen=True)
class Download:
    """One model of the hub.

    Attributes:
        name: owner/name.
        missing_bytes: of files that are not in the cache; None: it could not be found out.
        note: why not, or where they are.
    """

    name: str
    missing_bytes: int | None
    note: str = ""


def remote_models(recipe: Recipe) -> list[str]:
    """The hub ids among all that a recipe loads."""
    named = [recipe.teacher]
    named += [source for stage in recipe.stages for source in stage.starts.values()]
    if recipe.bench is not None:
        named.append(recipe.bench.evaluator)
    found = [name for name in named if "/" in name and not Path(name).exists() and not name.startswith("assets/")]
    return list(dict.fromkeys(name for name in found if name.count("/") == 1 and ":" not in name))


def downloads(recipe: Recipe) -> list[Download]:
    """What each of them still lacks on this machine."""
    return [_missing(name) for name in remote_models(recipe)]


def _missing(name: str) -> Download:
    from fnmatch import fnmatch

    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        return Download(name, None, f"the hub could not be asked ({first_line(error)})")
    # The weights of a pipeline lie in folders of its components; those at the top are single files of the same.
    wanted = [f for f in files if any(fnmatch(f.rfilename, p) for p in PATTERNS) and _is_read(f.rfilename)]
    missing = [f for f in wanted if not isinstance(try_to_load_from_cache(name, f.rfilename), str)]
    return Download(name, sum(f.size or 0 for f in missing), f"{len(missing)} of {len(wanted)} files")


def _is_read(file: str) -> bool:
    path = Path(file)
    if path.suffix != ".safetensors":
        return True
    return len(path.parts) > 1 and ".fp16." not in path.name and ".non_ema." not in path.name
