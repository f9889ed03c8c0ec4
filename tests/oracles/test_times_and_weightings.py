"""Where score objectives look, and how they weigh what they see: options beside what their papers settled on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.losses import matching_direction
from stepdistill.objectives.base import Step
from stepdistill.objectives.dmd import DMD
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.esd import ESD
from stepdistill.objectives.f_distill import FDistill
from stepdistill.objectives.vsd import VSD
from stepdistill.prediction import add_noise
from stepdistill.recipe import build_objective
from stepdistill.recipe_sections import ObjectiveConfig
from tests.oracles.oracle import AT_08, Linear, batch_of, constant, gaussian
from tests.oracles.sid_games import listening
from tests.oracles.test_f_distill import RolesWithHead, cast_of, exact_head


ALPHA, SIGMA = 0.8, 0.6  # of index 1
M, S, A, B = 0.7, 0.5, 1.3, -0.4
AT = {"t_min": AT_08[0], "t_max": AT_08[1]}
GAMES: dict[str, Any] = {
    "vsd": lambda **options: VSD(timesteps=(2,), guidance=1.0, **options),
    "esd": lambda **options: ESD(timesteps=(2,), guidance=1.0, **options),
    "dmd": lambda **options: DMD(timestep=2, guidance=1.0, regression_weight=0.0, **options),
    "dmd2": lambda **options: DMD2(timesteps=(2,), guidance=1.0, **options),
    "f_distill": lambda **options: FDistill(timesteps=(2,), guidance=1.0, gan_weight=0.0, **options),
}


def roles(network: Linear) -> RolesWithHead:
    return cast_of(network, exact_head())


def gradient(objective: Any, **labels: float) -> tuple[float, float]:
    """(d/da, d/db) of the student A z + B, with the same numbers drawn each time."""
    network = Linear(A, B)
    torch.manual_seed(1)
    z = torch.randn(64, 1, dtype=torch.float64)
    objective.student_loss(roles(network), batch_of(z, **labels), Step(0)).total.backward()
    return network.a.grad.item(), network.b.grad.item()


@pytest.mark.parametrize("name", GAMES)
def test_a_density_of_noise_takes_the_place_of_even_times(name: str) -> None:
    """log(sigma / alpha) = log 0.75 at index 1 of three alone."""
    seen = {}
    for density in (None, (math.log(SIGMA / ALPHA), 0.0)):
        cast = roles(Linear(A, B))
        asked = listening(cast.denoiser("teacher"))
        objective = GAMES[name](log_noise=density)
        for index in range(24):
            objective.student_loss(cast, batch_of(torch.randn(2, 1, dtype=torch.float64)), Step(index))
        seen[density] = {call["time"] for call in asked}
    assert seen.popitem()[1] == {1.0}
    assert seen[None] == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("name", GAMES)
def test_a_recipe_sets_the_density(name: str) -> None:
    entry = {"name": name, "log_noise": [-0.5, 1.2]}
    objective = build_objective(ObjectiveConfig.model_validate(entry), "x.yaml")
    assert objective.log_noise == (-0.5, 1.2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["vsd", "esd"])
def test_the_other_weight_of_prolificdreamers_code_is_alpha_times_the_one_in_use(name: str) -> None:
    """sqrt(alpha_bar) (1 - alpha_bar) = alpha sigma^2, at one time."""
    plain = gradient(GAMES[name](**AT))
    assert plain == gradient(GAMES[name](**AT, weighting="sigma_squared"))
    assert gradient(GAMES[name](**AT, weighting="alpha_sigma_squared")) == pytest.approx(
        tuple(ALPHA * value for value in plain), rel=1e-12
    )


@pytest.mark.parametrize("name", ["dmd", "dmd2"])
def test_the_weights_of_dmds_ablation_are_those_of_score_and_variational_distillation(name: str) -> None:
    vsd = gradient(GAMES["vsd"](**AT, guide_critic=False))
    assert gradient(GAMES[name](**AT, weighting="sigma_cubed_over_alpha")) == pytest.approx(vsd, rel=1e-12)
    assert gradient(GAMES[name](**AT, weighting="sigma_over_alpha")) == pytest.approx(
        tuple(value / SIGMA**2 for value in vsd), rel=1e-12
    )
    assert gradient(GAMES[name](**AT)) == gradient(GAMES[name](**AT, weighting="distance"))
    assert gradient(GAMES[name](**AT)) != pytest.approx(vsd, rel=1e-2)


@pytest.mark.parametrize(
    ("weighting", "weight"), [("sigma_over_alpha", SIGMA / ALPHA), ("sigma_cubed_over_alpha", SIGMA**3 / ALPHA)]
)
def test_a_weight_multiplies_alpha_times_the_difference_of_the_scores(weighting: Any, weight: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    t = torch.full((5,), 2 / 3, dtype=torch.float64)
    x_t = add_noise(gaussian(constant(M), S).schedule, x, t, torch.randn_like(x))
    condition = batch_of(x).condition
    real, fake = gaussian(constant(M), S)(x_t, t, condition), gaussian(constant(B), A)(x_t, t, condition)
    expected: Tensor = weight * ALPHA * (fake.score - real.score)
    torch.testing.assert_close(matching_direction(x, real, fake, weighting), expected, rtol=0, atol=1e-12)
