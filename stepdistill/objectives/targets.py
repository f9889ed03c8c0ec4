"""Whom a consistency-like loss compares the student with: itself, or a moving average of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.objectives.base import Recorded, Role


if TYPE_CHECKING:
    from stepdistill.cast import Cast


def target_name(decay: float) -> str:
    """The role that gives the targets, which carry no gradient: "target", or the student itself for decay 0."""
    return "target" if decay > 0 else "student"


def target_roles(decay: float) -> Mapping[str, Role]:
    """The role beside the student that holds its moving average; none for decay 0.

    Raises:
        UserError: `decay` is no decay.
    """
    if not 0 <= decay < 1:
        raise UserError(f"the decay of the target is {decay}; it must be at least 0, which takes the student itself "
                        "as its target, and less than 1, at which the target would never move")  # fmt: skip
    return {target_name(decay): Recorded(like="student")} if decay > 0 else {}


def follow(cast: Cast, step: int, *, decay: float, source: str = "student", target: str = "target") -> None:
    """For `after_step`: target <- decay target + (1 - decay) source; a copy after step 0, nothing for decay 0.

    Consistency models (arXiv 2303.01469), algorithm 2: the target is updated after every optimiser step.
    """
    if decay > 0 and step == 0:
        cast.copy(source, target)
    elif decay > 0:
        cast.blend(source, target, decay)


def needs_boundary(denoiser: Denoiser, method: str) -> None:
    """A consistency function returns its input at time 0, which noise and velocity predictions do by algebra.

    Raises:
        UserError: the network predicts the clean sample itself, and so is not bound to.
    """
    if denoiser.kind == "sample":
        raise UserError(f"{method} needs a network that predicts noise or a velocity (epsilon, v_prediction or flow), "
                        "because these return their input at time 0; this teacher predicts the clean sample. Use a "
                        "teacher of another prediction_type, or dmd2")  # fmt: skip
