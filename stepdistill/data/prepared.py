"""A cache that was made before the training, by `stepdistill data cache`, and that many runs may share.

    <folder>/conditions/<fingerprint>/{index.json, texts.json, shard-00000.safetensors, ...}
    <folder>/latents/<fingerprint>/{index.json, shard-00000.safetensors, shard-00000.json, ...}

A run only reads it. What does not fit the run, because another encoder or autoencoder made it or because texts or
images are missing, is refused with the names of what differs: to make it silently again might take days.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.condition import Condition
from stepdistill.data.cache import INDEX, ConditionCache, EncodedTexts
from stepdistill.data.images import ImageSet
from stepdistill.data.latents import LatentCache
from stepdistill.data.pairs import differences
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.files import write_whole


Progress = Callable[[int, int], None]

CONDITIONS, LATENTS = "conditions", "latents"
TEXTS = "texts.json"
REMEDY = "make it with: stepdistill data cache RECIPE --output FOLDER"
# How messages call the facts that are not named after a component of the pipeline.
CALLED = {"vae": "autoencoder (vae)", "text_encoder": "text encoder (text_encoder)", "scaling": "scaling of latents"}


class PreparedConditions:
    """Encodings of a run's prompts, found by their text among all that were prepared.

    Args:
        encoded: all of them.
        prompts: of the run, by number.
    """

    def __init__(self, encoded: EncodedTexts, prompts: PromptSet) -> None:
        self._encoded, self._prompts = encoded, prompts

    def build(self, progress: Progress | None = None) -> None:
        """Nothing to do."""

    def conditions(self, indices: Sequence[int]) -> Condition:
        """The encoded prompts with these numbers, on the CPU."""
        return self._encoded(self._prompts.batch(indices))


def prepare_conditions(
    folder: Path, family: ModelFamily, texts: Sequence[str], progress: Progress | None = None
) -> ConditionCache:
    """Encodes texts that are not encoded yet; goes on where it was stopped.

    Args:
        folder: the whole cache's.
        family: the loaded teacher.
        texts: also repeated ones, which are encoded once.
        progress: is told how far it is.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    known = PromptSet(tuple(dict.fromkeys(texts)))
    cache = ConditionCache(folder / CONDITIONS, family, known)
    cache.build(progress)
    # Last, since a cache without its texts counts as unfinished.
    try:
        write_whole(cache.folder / TEXTS, lambda new: new.write_text(json.dumps(known.prompts)))
    except OSError as error:
        raise UserError(f"{cache.folder}: the texts of encoded prompts cannot be written ({error}); free some space "
                        "and run the same command again, what is finished is kept") from error  # fmt: skip
    return cache


def open_conditions(folder: Path, family: ModelFamily, prompts: PromptSet) -> PreparedConditions:
    """The prepared encodings of a run's prompts.

    Raises:
        UserError: there are none, another encoder made them, or prompts are missing among them.
    """
    refused, lacking = [], []
    for place, index in _caches(folder / CONDITIONS):
        if not (place / TEXTS).is_file():
            refused.append(f"{place.name} is not finished")
            continue
        known = PromptSet(tuple(json.loads((place / TEXTS).read_text())))
        cache = ConditionCache(folder / CONDITIONS, family, known)
        if cache.folder != place:
            refused.append(_named_differences(index["facts"], cache.facts))
            continue
        there = set(known.prompts)
        missing = [text for text in dict.fromkeys(prompts.prompts) if text not in there]
        if not missing:
            return PreparedConditions(EncodedTexts(cache, known), prompts)
        lacking.append(f"it lacks {len(missing)} of {len(prompts)} prompts, for example {missing[0]!r}")
    raise _refusal(folder, "encoded prompts", lacking or refused)


def open_latents(folder: Path, family: ModelFamily, images: ImageSet, count: int) -> LatentCache:
    """The prepared encodings of a run's images.

    Raises:
        UserError: there are none, another autoencoder made them, or they are of other images.
    """
    cache = LatentCache(folder / LATENTS, family, images, count)
    if cache.folder.is_dir():
        cache.open()
        return cache
    found = [_named_differences(index["facts"], cache.facts) for _, index in _caches(folder / LATENTS)]
    raise _refusal(folder, "encoded images", found)


def _caches(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for file in sorted(folder.glob(f"*/{INDEX}")):
        yield file.parent, json.loads(file.read_text())


def _named_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    called = [{CALLED.get(name, name): value for name, value in facts.items()} for facts in (there, here)]
    return differences(*called)


def _refusal(folder: Path, what: str, reasons: Sequence[str]) -> UserError:
    if not reasons:
        return UserError(f"data.cache_folder: {folder} holds no {what}; {REMEDY}")
    why = "; ".join(reasons)
    return UserError(f"data.cache_folder: the {what} in {folder} do not fit this run ({why}); {REMEDY}, or leave "
                     "data.cache_folder out")  # fmt: skip
