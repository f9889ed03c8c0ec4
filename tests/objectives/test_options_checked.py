"""Options that would make a run wrong without a word are refused when the game is made."""

from __future__ import annotations

from typing import Any

import pytest

from stepdistill.errors import UserError
from stepdistill.objectives.add import ADD
from stepdistill.objectives.compress import Compress
from stepdistill.objectives.denoising import Denoising
from stepdistill.objectives.disback import DisBack
from stepdistill.objectives.dmd import DMD
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.esd import ESD
from stepdistill.objectives.f_distill import FDistill
from stepdistill.objectives.sid import SiD
from stepdistill.objectives.vsd import VSD


@pytest.mark.parametrize("kind", [ADD, Compress, Denoising, DMD, DMD2, ESD, FDistill, SiD, VSD])
@pytest.mark.parametrize("times", [(20.0, 980.0), (0.9, 0.1), (-0.1, 0.5)])
def test_times_are_fractions_that_rise(kind: type, times: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"t_min and t_max are fractions .* timestep 20 of 1000 is 0\.02"):
        kind(t_min=times[0], t_max=times[1])
    kind(t_min=0.6, t_max=0.6)


@pytest.mark.parametrize("kind", [DMD, DMD2, ESD, FDistill, SiD, VSD])
def test_a_critic_that_never_learns_is_refused(kind: type) -> None:
    with pytest.raises(UserError, match="critic_updates must be at least 1, got 0"):
        kind(critic_updates=0)


@pytest.mark.parametrize("share", [-0.1, 10.0])
def test_dropped_prompts_are_a_share(share: float) -> None:
    games: list[Any] = [Compress, Denoising, ESD, SiD, VSD, lambda **options: DisBack(DMD2(), **options)]
    for kind in games:
        with pytest.raises(UserError, match="condition_dropout is a share from 0 to 1"):
            kind(condition_dropout=share)


@pytest.mark.parametrize("name", ["gan_weight", "discriminator_weight"])
def test_sid_has_no_negative_game(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must not be negative, got -1.0; 0 switches the term off"):
        SiD(**{name: -1.0})


def test_ratios_need_a_discriminator_that_learns() -> None:
    with pytest.raises(UserError, match="discriminator_weight must be positive"):
        FDistill(discriminator_weight=0.0)
