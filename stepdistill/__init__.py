"""Distils diffusion models into stock Diffusers pipelines that need one to four network calls.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.condition import Condition
    from stepdistill.denoiser import Denoiser
    from stepdistill.errors import UserError
    from stepdistill.families import load_family
    from stepdistill.guidance.files import load_adapter
    from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Objective, Phase, Step, Trained
    from stepdistill.prediction import Prediction
    from stepdistill.recipe import Recipe
    from stepdistill.routed import load_students
    from stepdistill.run import RunResult, train
    from stepdistill.schedule import NoiseSchedule


try:
    __version__ = version("stepdistill")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0.0.0"

_PLACES = {
    "Batch": "objectives.base",
    "Cast": "cast",
    "Condition": "condition",
    "Denoiser": "denoiser",
    "Frozen": "objectives.base",
    "InferenceSpec": "objectives.base",
    "Loss": "objectives.base",
    "NoiseSchedule": "schedule",
    "Objective": "objectives.base",
    "Phase": "objectives.base",
    "Prediction": "prediction",
    "Recipe": "recipe",
    "RunResult": "run",
    "Step": "objectives.base",
    "Trained": "objectives.base",
    "UserError": "errors",
    "load_adapter": "guidance.files",
    "load_family": "families",
    "load_students": "routed",
    "train": "run",
}

__all__ = [
    "Batch",
    "Cast",
    "Condition",
    "Denoiser",
    "Frozen",
    "InferenceSpec",
    "Loss",
    "NoiseSchedule",
    "Objective",
    "Phase",
    "Prediction",
    "Recipe",
    "RunResult",
    "Step",
    "Trained",
    "UserError",
    "__version__",
    "load_adapter",
    "load_family",
    "load_students",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
