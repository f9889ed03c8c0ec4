"""Samplers and guided calls, against closed forms and by counting what the network is asked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.objectives.base import InferenceSpec
from stepdistill.prediction import add_more_noise
from stepdistill.sampling import approach, ddim, ddim_step, few_steps, stochastic, student_samples, tcd_step
from stepdistill.schedule import FlowSchedule, NoiseSchedule, TrigFlowSchedule, from_scheduler_config
from stepdistill.times import grid
from tests.oracles.oracle import gaussian, label


SD = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})[0]
M, S = 0.7, 0.5
COUNT = 5


def conditions(value: float) -> Condition:
    return Condition({"label": torch.full((COUNT,), value, dtype=torch.float64)})


def noise() -> Tensor:
    return torch.randn(COUNT, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A network call that remembers what it was asked and answers from the label."""

    def __init__(self) -> None:
        self.calls: list[Mapping[str, Any]] = []

    def __call__(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        self.calls.append({"x_t": x_t, "time": model_time, "label": condition.tensors["label"]})
        return 0.1 * x_t + condition.tensors["label"].reshape(-1, 1, 1, 1)


def recording(schedule: NoiseSchedule = SD) -> tuple[Denoiser, Recorder]:
    recorder = Recorder()
    return Denoiser(recorder, OwnWeights(nn.Module()), schedule, "epsilon"), recorder


def slope(t: float, s: float) -> float:
    """A DDIM step from t to s on a Gaussian teacher is affine around the mean's path, with this slope."""
    a, b = (torch.tensor([v], dtype=torch.float64) for v in (t, s))
    v = SD.alpha(a) ** 2 * S**2 + SD.sigma(a) ** 2
    return float((SD.alpha(b) * SD.alpha(a) * S**2 + SD.sigma(b) * SD.sigma(a)) / v)


@pytest.mark.parametrize("indices", [(999,), (999, 499), (999, 749, 499, 249)])
def test_ddim_on_a_gaussian_teacher_is_the_product_of_its_slopes(indices: tuple[int, ...]) -> None:
    times = grid(SD, indices, torch.device("cpu"))
    path = [*times.tolist(), 0.0]
    product = 1.0
    for t, s in pairwise(path):
        product *= slope(t, s)
    x = ddim(gaussian(label, S, SD), noise(), times, conditions(M), null=conditions(0.0), guidance=1.0)
    torch.testing.assert_close(x, M + product * (noise() - SD.alpha(times[:1]) * M), rtol=0, atol=1e-10)


def test_ddim_with_many_steps_is_the_exact_map_of_the_probability_flow() -> None:
    """The flow of N(m, s^2) keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) constant."""
    schedule = TrigFlowSchedule()  # smooth everywhere, so the order of convergence can be seen
    first = torch.tensor([0.98], dtype=torch.float64)
    alpha, sigma = schedule.alpha(first), schedule.sigma(first)
    exact = M + S * (noise() - alpha * M) / (alpha**2 * S**2 + sigma**2).sqrt()
    ends = []
    for steps in (100, 200, 400):
        times = torch.linspace(0.98, 0.0, steps + 1, dtype=torch.float64)[:-1]
        ends.append(ddim(gaussian(label, S, schedule), noise(), times, conditions(M), null=conditions(0), guidance=1))
    errors = [(end - exact).abs().max().item() for end in ends]
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05), "first order in the step"
    assert errors[2] == pytest.approx(errors[1] / 2, rel=0.05)
    torch.testing.assert_close(2 * ends[2] - ends[1], exact, rtol=0, atol=1e-4)  # the limit, extrapolated


def test_guided_ddim_on_gaussians_samples_the_guided_gaussian() -> None:
    """Equal variances: guidance moves the mean to m_null + kappa (m_c - m_null), exactly."""
    times = grid(SD, tuple(range(999, 0, -50)), torch.device("cpu"))
    teacher = gaussian(label, S, SD)
    guided = ddim(teacher, noise(), times, conditions(1.0), null=conditions(-0.5), guidance=3.0)
    moved = ddim(teacher, noise(), times, conditions(-0.5 + 3.0 * 1.5), null=conditions(0.0), guidance=1.0)
    torch.testing.assert_close(guided, moved, rtol=0, atol=1e-9)


def test_a_ddim_step_to_its_own_time_does_nothing() -> None:
    for schedule in (SD, FlowSchedule(3.0)):
        t = torch.full((COUNT,), 0.6, dtype=torch.float64)
        teacher = gaussian(label, S, schedule)
        prediction = teacher(noise(), t, conditions(M))
        torch.testing.assert_close(ddim_step(teacher, prediction, t), noise(), rtol=0, atol=1e-12)


def test_the_stochastic_sampler_calls_the_student_once_at_each_of_its_timesteps() -> None:
    student, recorder = recording()
    indices = (999, 749, 499, 249)
    stochastic(student, noise(), grid(SD, indices, torch.device("cpu")), conditions(0.0))
    assert [call["time"].unique().tolist() for call in recorder.calls] == [[float(i)] for i in indices]
    assert all(len(call["x_t"]) == COUNT for call in recorder.calls)
    assert torch.equal(recorder.calls[0]["x_t"], noise()), "the first call sees the noise as it is"


def test_the_stochastic_sampler_puts_fresh_noise_on_each_clean_prediction() -> None:
    student, recorder = recording()
    times = grid(SD, (999, 499), torch.device("cpu"))
    torch.manual_seed(0)
    x = stochastic(student, noise(), times, conditions(0.0))
    torch.manual_seed(0)
    eps = torch.randn_like(noise())
    clean = student(noise(), times[:1].expand(COUNT), conditions(0.0)).x0
    expected = SD.alpha(times[1]) * clean + SD.sigma(times[1]) * eps
    torch.testing.assert_close(recorder.calls[1]["x_t"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x, student(expected, times[1:].expand(COUNT), conditions(0.0)).x0, rtol=0, atol=1e-10)


def test_one_step_is_one_call_and_needs_no_generator() -> None:
    student, recorder = recording()
    before = torch.get_rng_state()
    stochastic(student, noise(), grid(SD, (999,), torch.device("cpu")), conditions(0.0))
    assert len(recorder.calls) == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("scale", "asked"), [(1.0, 1.0), (0.0, -1.0), (1, 1.0), (0, -1.0)])
def test_guidance_of_one_or_zero_is_one_call_without_a_second_half(scale: float, asked: float) -> None:
    view, recorder = recording()
    t = torch.full((COUNT,), 0.5)
    said = view.guided(noise(), t, conditions(1.0), conditions(-1.0), scale)
    (call,) = recorder.calls
    assert call["label"].tolist() == [asked] * COUNT
    assert torch.equal(said.native, 0.1 * noise() + asked)


def test_guidance_is_one_call_with_both_halves_and_the_standard_formula() -> None:
    view, recorder = recording()
    t = torch.linspace(0.1, 0.9, COUNT)
    said = view.guided(noise(), t, conditions(1.0), conditions(-1.0), 3.0)
    (call,) = recorder.calls
    assert call["label"].tolist() == [1.0] * COUNT + [-1.0] * COUNT
    assert call["time"][:COUNT].tolist() == call["time"][COUNT:].tolist()
    torch.testing.assert_close(said.native, 0.1 * noise() + (-1.0 + 3.0 * 2.0), rtol=0, atol=1e-12)
    unguided = view(noise(), t, conditions(1.0))
    torch.testing.assert_close(said.levels.alpha, unguided.levels.alpha)
    assert torch.equal(said.x_t, noise())


def test_a_guidance_scale_per_row_guides_every_row_by_its_own() -> None:
    view, _ = recording()
    t, scales = torch.full((COUNT,), 0.5), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    said = view.guided(noise(), t, conditions(1.0), conditions(-1.0), scales)
    expected = 0.1 * noise() + (-1.0 + scales * 2.0).double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(said.native, expected, rtol=0, atol=1e-12)


# ---- more noise, and TCD's sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SD, FlowSchedule(3.0), TrigFlowSchedule()], ids=["vp", "flow", "trig"])
def test_more_noise_turns_the_law_at_one_time_into_the_law_at_a_later_one(schedule: NoiseSchedule) -> None:
    """Mean alpha_s m becomes alpha_t m, variance alpha_s^2 S^2 + sigma_s^2 becomes the same at t."""
    s, t = (torch.full((1,), v, dtype=torch.float64) for v in (0.3, 0.8))
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    ratio, fresh = (add_more_noise(schedule, *pair) for pair in ((one, s, t, none), (none, s, t, one)))
    torch.testing.assert_close(ratio[0] * schedule.alpha(s), schedule.alpha(t), rtol=1e-12, atol=0)
    variances = [schedule.alpha(v) ** 2 * S**2 + schedule.sigma(v) ** 2 for v in (s, t)]
    torch.testing.assert_close(ratio[0] ** 2 * variances[0] + fresh[0] ** 2, variances[1], rtol=1e-12, atol=0)
    assert torch.equal(add_more_noise(schedule, one, t, t, one), one), "no time, no noise"


def test_more_noise_on_clean_data_is_noise_as_usual() -> None:
    x0, eps, t = noise(), noise().flip(0), torch.full((COUNT,), 0.6, dtype=torch.float64)
    made = add_more_noise(SD, x0, torch.zeros(COUNT), t, eps)
    torch.testing.assert_close(made, SD.alpha(t[0]) * x0 + SD.sigma(t[0]) * eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [SD, FlowSchedule(3.0)], ids=["vp", "flow"])
def test_tcd_lies_between_the_deterministic_and_the_stochastic_sampler(schedule: NoiseSchedule) -> None:
    student, times = gaussian(label, S, schedule), grid(schedule, (949, 749, 499, 249), torch.device("cpu"))
    still = few_steps(student, noise(), times, conditions(M), "tcd", 0.0)
    expected = ddim(student, noise(), times, conditions(M), null=conditions(0.0), guidance=1.0)
    torch.testing.assert_close(still, expected, rtol=0, atol=1e-12)
    torch.manual_seed(0)
    fresh = few_steps(student, noise(), times, conditions(M), "tcd", 1.0)
    torch.manual_seed(0)
    torch.testing.assert_close(fresh, stochastic(student, noise(), times, conditions(M)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [SD, FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_a_tcd_step_has_the_moments_of_its_two_halves(schedule: NoiseSchedule, eta: float) -> None:
    """On a Gaussian teacher the way down is affine with the DDIM slope, and the way up adds what is missing."""
    t, there = (torch.full((1,), v, dtype=torch.float64) for v in (0.9, 0.5))
    # of a table of 1000, index 499 is 0.5, and the index below it is floor((1 - eta) 499)
    low = (int((1 - eta) * 499) + 1) / 1000 if schedule is SD else (1 - eta) * 0.5
    s = torch.full((1,), low, dtype=torch.float64)

    def level(v: Tensor) -> tuple[float, float]:
        return float(schedule.alpha(v)), float(schedule.sigma(v))

    (a_t, s_t), (a_s, s_s), (a_n, s_n) = level(t), level(s), level(there)
    v_t = a_t**2 * S**2 + s_t**2
    down = (a_s * a_t * S**2 + s_s * s_t) / v_t
    fresh = s_n**2 - (a_n / a_s * s_s) ** 2
    count = 200_000
    torch.manual_seed(0)
    x_t = a_t * M + v_t**0.5 * torch.randn(count, 1, 1, 1, dtype=torch.float64)
    condition = Condition({"label": torch.full((count,), M, dtype=torch.float64)})
    said = gaussian(label, S, schedule)(x_t, t.expand(count), condition)
    made = tcd_step(gaussian(label, S, schedule), said, there.expand(count), eta)
    variance = (a_n / a_s * down) ** 2 * v_t + fresh
    assert made.mean().item() == pytest.approx(a_n * M, abs=4 * (variance / count) ** 0.5)
    assert made.var().item() == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)
    # The exact map would have the right variance for every eta; one DDIM step loses some.
    assert variance < a_n**2 * S**2 + s_n**2


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_tcd_rounds_timesteps_as_the_stock_scheduler_does(eta: float) -> None:
    index = torch.arange(1, 1000)
    expected = torch.floor((1 - eta) * index).long()  # TCDScheduler's own expression
    student, _ = recording()
    t = SD.t_from_model_time(index.double())
    x = torch.zeros(len(index), 1, 1, 1, dtype=torch.float64)
    said = student(x, torch.ones(len(index)), Condition({"label": torch.ones(len(index), dtype=torch.float64)}))
    torch.manual_seed(0)
    made = tcd_step(student, said, t, eta)
    torch.manual_seed(0)
    eps = torch.randn_like(x)
    s = torch.where(expected > 0, SD.t_from_model_time(expected), 0.0)
    torch.testing.assert_close(made, add_more_noise(SD, ddim_step(student, said, s), s, t, eps), rtol=0, atol=1e-12)


def test_only_the_deterministic_sampler_begins_with_scaled_noise() -> None:
    first = grid(SD, (999,), torch.device("cpu"))
    for sampler in ("stochastic", "tcd", "deterministic"):
        begun = approach(recording()[0], noise(), first, conditions(0.0), sampler, 0.0)
        scale = SD.sigma(first) if sampler == "deterministic" else 1.0
        torch.testing.assert_close(begun, scale * noise(), rtol=0, atol=1e-12)


def test_a_finished_student_is_sampled_as_its_spec_says() -> None:
    spec = InferenceSpec((999, 499), "tcd", eta=0.4)
    student = gaussian(label, S, SD)
    torch.manual_seed(0)
    made = student_samples(student, noise(), conditions(M), spec)
    torch.manual_seed(0)
    expected = few_steps(student, noise(), grid(SD, (999, 499), torch.device("cpu")), conditions(M), "tcd", 0.4)
    assert torch.equal(made, expected)


@pytest.mark.parametrize(("sampler", "eta"), [("tcd", 1.1), ("tcd", -0.1), ("stochastic", 0.3)])
def test_an_eta_that_means_nothing_is_refused(sampler: Any, eta: float) -> None:
    with pytest.raises(UserError, match=f"eta is a number from 0 to 1 for the sampler tcd.* got {eta:g}"):
        InferenceSpec((999,), sampler, eta=eta)
