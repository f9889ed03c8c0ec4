"""Rewards: what an image is worth for its prompt, with gradients to the image; found by name or by Python path.

Letters: B images, H height, W width.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from stepdistill.clip_model import image_text_model
from stepdistill.errors import UserError
from stepdistill.objectives import find
from stepdistill.options import NestedOptions, build_dataclass, plain_options


class Reward(Protocol):
    """Judges images: a function, or an object with options."""

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and their B prompts => what each is worth, (B,); more is better."""


@dataclass(frozen=True)
class ClipScore:
    """The cosine of image and prompt as a CLIP model sees them, between -1 and 1.

    Attributes:
        model: folder of a local `CLIPModel` with tokenizer and preprocessor_config.json; the bundled evaluator.
    """

    model: str = "assets/shapes/clip"

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        return image_text_model(self.model, images.device).cosines(images, prompts)


# name in recipes => where it lives
REWARDS: dict[str, str] = {"clip": "stepdistill.rewards:ClipScore"}


def name_of_reward(reward: Reward) -> str:
    """The name by which a recipe finds a reward: a short one if it has one, else "package.module:name"."""
    # A Protocol says nothing about names, and functions and classes both have them.
    thing: Any = type(reward) if dataclasses.is_dataclass(reward) else reward
    place = f"{thing.__module__}:{thing.__qualname__}"
    return next((name for name, known in REWARDS.items() if known == place), place)


def read_reward(entry: Mapping[str, Any], where: str) -> Reward:
    """The reward that an entry ``{name: clip, model: folder}`` describes.

    Args:
        entry: a name or "package.module:name", and, where that is a dataclass, its fields.
        where: how error messages call the place.

    Raises:
        UserError: nothing of that name, not something that can be called, or a line for every mistaken option.
    """
    name, options = entry.get("name"), {key: value for key, value in entry.items() if key != "name"}
    if not isinstance(name, str):
        raise UserError(f"{where}.name: expected a reward's name, got {reprlib.repr(name)}")
    try:
        found = find(name, REWARDS, "reward")
    except UserError as error:
        raise UserError(f"{where}.name: {error}") from error
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        return cast("Reward", build_dataclass(found, options, where))
    if isinstance(found, type) or not callable(found):
        raise UserError(f"{where}.name: {name} is neither a function of images and prompts nor a dataclass that can "
                        "be called with them")  # fmt: skip
    if options:
        raise UserError(f"{where}.{next(iter(options))}: unknown key; {name} is a function, which has no options; "
                        "make it a dataclass with a __call__")  # fmt: skip
    return cast("Reward", found)


def write_reward(reward: Reward) -> dict[str, Any]:
    """The entry that describes a reward, all defaults written out."""
    return {"name": name_of_reward(reward), **(plain_options(reward) if dataclasses.is_dataclass(reward) else {})}


REWARD = NestedOptions(read_reward, write_reward)
