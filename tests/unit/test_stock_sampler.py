"""The teacher's stock sampler: against the stock pipeline, and against closed forms."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.data.pairs import pair_noise
from stepdistill.data.sampler import SAMPLERS, StockSampler
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.sampling import ddim_step
from stepdistill.schedule import FlowSchedule, from_scheduler_config
from tests.oracles.oracle import gaussian


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_samples_are_those_of_the_stock_pipeline(sd: ModelFamily, name: str) -> None:
    pipeline, prompts = sd.pipeline, ["red", "a ring"]
    config = pipeline.scheduler.config
    noise = torch.stack([pair_noise(0, i, sd.latent_shape()) for i in range(2)])
    sampler = StockSampler(sd.denoiser(), config, name=name, steps=5, guidance=3.0)
    ours = sampler(noise, sd.encode_prompts(prompts), sd.null_condition(2)).sample
    pipeline.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(config, timestep_spacing="trailing")
    stock = pipeline(
        prompts, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
    ).images  # fmt: skip
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert sampler.timesteps[0] == 999, "pure noise belongs to the last training timestep"


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_the_sampler_follows_the_probability_flow_of_a_gaussian(name: str) -> None:
    """(x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is constant along the flow."""
    config = {"_class_name": "DDIMScheduler", **BETAS, "set_alpha_to_one": True}
    schedule, _ = from_scheduler_config(config)
    mean, std = 0.7, 0.5
    teacher = gaussian(lambda condition: torch.full((len(condition),), mean, dtype=torch.float64), std, schedule)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    empty = Condition({"label": torch.zeros(9)})
    end = StockSampler(teacher, config, name=name, steps=200)(noise, empty, empty).sample
    last = torch.ones(1, dtype=torch.float64)
    alpha, sigma = schedule.alpha(last), schedule.sigma(last)
    expected = mean + std * (noise - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()
    torch.testing.assert_close(end, expected, rtol=0, atol=0.02)


def test_a_flow_matching_teacher_is_sampled_with_its_own_scheduler() -> None:
    schedule, mean, std = FlowSchedule(), 0.7, 0.5

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time).reshape(-1, 1, 1, 1)
        score = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * score - (mean + (1 - t) * std**2 * score)  # eps - x0

    teacher = Denoiser(call, OwnWeights(nn.Module()), schedule, "flow")
    noise = torch.linspace(-2, 2, 9)[:, None, None, None]
    empty = Condition({"label": torch.zeros(9)})
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    end = StockSampler(teacher, config, name="euler", steps=200)(noise, empty, empty).sample
    torch.testing.assert_close(end.double(), mean + std * noise.double(), rtol=0, atol=0.02)
    with pytest.raises(UserError, match="'ddim' does not fit this teacher; choose from euler"):
        StockSampler(teacher, config, name="ddim")


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_kept_states_are_what_the_network_was_given(sd: ModelFamily, name: str) -> None:
    teacher, config = sd.denoiser(), sd.pipeline.scheduler.config
    noise = torch.stack([pair_noise(0, i, sd.latent_shape()) for i in range(2)])
    condition, null = sd.encode_prompts(["a", "b"]), sd.null_condition(2)
    sampler = StockSampler(teacher, config, name=name, steps=4, guidance=2.0, keep=(999, 749))
    states = sampler(noise, condition, null).states
    assert states is not None and states.shape == (2, 2, *sd.latent_shape())
    # Euler's first state has unit variance within the half percent that its stock scale leaves.
    torch.testing.assert_close(states[:, 0], noise, rtol=0.005, atol=0)
    t, s = (teacher.schedule.t_from_model_time(torch.full((2,), i)) for i in (999.0, 749.0))
    following = ddim_step(teacher, teacher.guided(states[:, 0], t, condition, null, 2.0), s)
    torch.testing.assert_close(states[:, 1], following, rtol=1e-3, atol=1e-3)
