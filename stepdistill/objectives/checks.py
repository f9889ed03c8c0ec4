"""Options that many games have, checked when a game is made: beyond these limits a run would be silently wrong."""

from __future__ import annotations

from stepdistill.errors import UserError


def check_times(low: float, high: float) -> None:
    """Raises UserError unless 0 <= t_min <= t_max <= 1.

    A flow-matching teacher would be asked at times that do not exist, and only a VP teacher's table would notice.
    """
    if not 0 <= low <= high <= 1:
        raise UserError(f"t_min and t_max are fractions of the schedule, 0 <= t_min <= t_max <= 1, got {low:g} and "
                        f"{high:g}; timestep 20 of 1000 is 0.02")  # fmt: skip


def check_share(name: str, value: float) -> None:
    """Raises UserError unless an option is a probability."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is a share from 0 to 1, got {value:g}; 10 % is 0.1")


def check_updates(name: str, value: int) -> None:
    """Raises UserError unless a role is trained at all: with a critic as it began, a student is led astray."""
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")


def check_weights(**weights: float) -> None:
    """Raises UserError for a weight by which a term would be climbed instead of descended."""
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"{name} must not be negative, got {weight}; 0 switches the term off")


def check_lead(value: int) -> None:
    """Raises UserError for a number of iterations that cannot be."""
    if value < 0:
        raise UserError(f"critic_lead must not be negative, got {value}; 0 lets the student play from the first "
                        "iteration on")  # fmt: skip
