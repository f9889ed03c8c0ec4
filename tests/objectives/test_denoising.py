"""Plain denoising: where on the noise path it trains, on what, and that a flow teacher learns by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.denoising import Denoising
from stepdistill.options import build_named
from stepdistill.schedule import FlowSchedule, NoiseSchedule, from_scheduler_config
from tests.tiny import PaintedLatents, trainer_of


COUNT = 20_000
DDPM = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def played(objective: Denoising, schedule: NoiseSchedule, kind: str, x0: float = 0.0) -> tuple[Tensor, Any, Tensor]:
    """The model times and inputs of one batch whose images are all x0, and the loss of a network that says 0."""
    seen: list[Tensor] = []

    def network(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        seen.extend((model_time, x_t, condition.tensors["prompt"]))
        return torch.zeros_like(x_t)

    denoiser = Denoiser(network, OwnWeights(nn.Identity()), schedule, kind)
    condition, null = (Condition({"prompt": torch.full((COUNT, 1), value)}) for value in (1.0, 0.0))
    latents = torch.full((COUNT, 1, 1, 1), x0)
    batch = Batch(condition, null, (1, 1, 1), torch.device("cpu"), latents=latents)
    torch.manual_seed(0)
    cast: Any = SimpleNamespace(denoiser=lambda role: {"student": denoiser}[role])
    loss = objective.loss(cast, batch, Step(0))
    return seen[0].double(), seen[2], loss.total


def test_logit_normal_times_of_a_flow_have_a_normal_logit_of_sigma_whatever_the_shift() -> None:
    for shift in (1.0, 3.0):
        told, _, _ = played(Denoising(times="logit_normal", mean=-0.5, std=0.8), FlowSchedule(shift), "flow")
        logit = torch.logit(told / 1000)
        assert logit.mean().item() == pytest.approx(-0.5, abs=0.025)
        assert logit.std().item() == pytest.approx(0.8, abs=0.02)
        inside = ((logit + 0.5).abs() < 0.8).double().mean().item()
        assert inside == pytest.approx(0.6827, abs=0.015), "not a normal density"


def test_logit_normal_times_of_a_table_are_timesteps_it_knows() -> None:
    schedule, kind = from_scheduler_config(DDPM)
    told, _, _ = played(Denoising(times="logit_normal", mean=-0.5, std=0.8), schedule, kind)
    assert torch.equal(told, told.round())
    t = schedule.t_from_model_time(told)
    log_noise = (schedule.sigma(t) / schedule.alpha(t)).log()
    assert log_noise.mean().item() == pytest.approx(-0.5, abs=0.025)
    assert log_noise.std().item() == pytest.approx(0.8, abs=0.02)


def test_uniform_times_of_a_flow_are_uniform_before_the_shift_and_keep_to_their_range() -> None:
    schedule = FlowSchedule(3.0)
    told, _, _ = played(Denoising(t_min=0.2, t_max=0.6), schedule, "flow")
    t = schedule.t_from_model_time(told)
    assert 0.2 - 1e-6 <= t.min() < 0.201
    assert 0.599 < t.max() <= 0.6 + 1e-6
    assert t.mean().item() == pytest.approx(0.4, abs=0.005)


def test_the_target_of_a_flow_is_noise_minus_data() -> None:
    # A network that says 0 is wrong by (eps - x0)^2, whose mean is 1 + x0^2 at every time.
    for times in ("uniform", "logit_normal"):
        _, _, loss = played(Denoising(times=times), FlowSchedule(), "flow", x0=2.0)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(5.0, rel=0.03)


def test_a_share_of_the_prompts_is_dropped() -> None:
    _, prompts, _ = played(Denoising(condition_dropout=0.3), FlowSchedule(), "flow")
    assert prompts.mean().item() == pytest.approx(0.7, abs=0.015)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"std is 0\.0; it must be above 0"):
        Denoising(std=0.0)
    with pytest.raises(UserError, match=r"stage\.times"):
        build_named("denoising", {"times": "logitnormal"}, "stage")


def test_a_flow_teacher_learns_its_images(sd3: ModelFamily) -> None:
    game = Denoising(times="logit_normal")
    trainer = trainer_of(sd3, game, steps=40, batch_size=8, player={"options": {"lr": 1e-2}})
    trainer.batches.latents = PaintedLatents()
    losses: list[float] = []
    trainer.on_step = lambda progress: losses.append(float(progress.losses["denoising"]))
    trainer.run()
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
