"""Guidance distillation on Gaussians: whom the student has to equal, what an adapter has to add, and by what gradient.

Means m_c with the prompt and m_u without, one std s: the guided teacher is exactly the Gaussian of mean
m_w = m_u + w (m_c - m_u), and its noise differs from the conditional one by -(w - 1) (alpha sigma / v) (m_c - m_u).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.guidance.modules import AdapterSettings, AttentionShape, GuidanceAdapter
from stepdistill.objectives.agd import AGD
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Step, Trained, Visited
from stepdistill.objectives.guidance import GuidanceDistillation
from stepdistill.prediction import Levels
from stepdistill.schedule import NoiseSchedule
from tests.oracles.exact import TEACHERS, exact, times_of
from tests.oracles.oracle import Roles, batch_of, label, shaped
from tests.oracles.trajectories import STD, VP, images


WITH, WITHOUT = 1.0, 0.25  # the means with and without the prompt


def mean_of(scale: Tensor | float) -> Tensor | float:
    return WITHOUT + scale * (WITH - WITHOUT)


def told_mean(condition: Condition) -> Tensor:
    """The mean of a student that takes the scale as an input and has learnt everything."""
    return WITHOUT + condition.tensors["guidance"] * (label(condition) - WITHOUT)


def data(count: int = 64) -> Batch:
    """A batch of the images stream: samples of the conditional Gaussian."""
    torch.manual_seed(0)
    return fresh(count)


def fresh(count: int) -> Batch:
    """The same, of torch's own seed."""
    x0 = WITH + STD * torch.randn(count, 1, dtype=torch.float64)
    return images(x0, torch.randn_like(x0), WITH, WITHOUT)


def stored(schedule: NoiseSchedule, kind: str, scales: Tensor, count: int = 64) -> Batch:
    """A batch of the states stream: places anywhere, and what the exact guided teacher says there."""
    torch.manual_seed(0)
    x_t, t = 2 * torch.randn(count, 1, dtype=torch.float64), torch.rand(count, dtype=torch.float64).clamp(0.05)
    batch = batch_of(x_t, WITH, WITHOUT)
    teacher = exact(schedule, kind, label, STD)
    native = teacher.guided(x_t, t, batch.condition, batch.null, scales).native
    object.__setattr__(batch, "visited", Visited(x_t, t, scales, native))
    return batch


def roles(schedule: NoiseSchedule, kind: str, student: Denoiser) -> Any:
    return Roles({"teacher": exact(schedule, kind, label, STD), "student": student})


# ---- the objective `guidance` --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "kind"), TEACHERS)
@pytest.mark.parametrize("weighting", ["native", "truncated_snr", "snr_plus_one"])
def test_the_shifted_gaussian_is_the_optimum_and_no_other_mean_is(
    schedule: NoiseSchedule, kind: str, weighting: Any
) -> None:
    objective = GuidanceDistillation(4.0, weighting=weighting)
    for off, floor in ((0.0, 0.0), (0.3, 1e-4)):
        student = exact(schedule, kind, lambda c, off=off: torch.full((len(c),), mean_of(4.0) + off), STD)  # type: ignore[misc]
        loss = objective.loss(roles(schedule, kind, student), data(), Step(0)).total
        assert loss < 1e-18 if off == 0 else loss > floor


@pytest.mark.parametrize(("schedule", "kind"), TEACHERS)
@pytest.mark.parametrize("learn_on", ["images", "pairs", "states"])
def test_a_student_that_takes_the_scale_is_right_at_every_scale_at_once(
    schedule: NoiseSchedule, kind: str, learn_on: Any
) -> None:
    objective = GuidanceDistillation((0.5, 9.0), embed_guidance=True, learn_on=learn_on)
    scales = torch.linspace(0.5, 9.0, 64, dtype=torch.float64)
    batch = stored(schedule, kind, scales) if learn_on == "states" else data()
    for mean, right in ((told_mean, True), (label, False)):
        loss = objective.loss(roles(schedule, kind, exact(schedule, kind, mean, STD)), batch, Step(0)).total
        assert (loss < 1e-18) == right


def test_paths_of_other_scales_are_refused_where_the_student_cannot_tell_them_apart() -> None:
    objective, student = GuidanceDistillation(4.0, learn_on="states"), exact(VP, "epsilon", label, STD)
    game = roles(VP, "epsilon", student)
    alone, mixed = (torch.full((64,), 4.0, dtype=torch.float64), torch.linspace(3.0, 5.0, 64, dtype=torch.float64))
    assert objective.loss(game, stored(VP, "epsilon", alone), Step(0)).total > 0
    with pytest.raises(UserError, match="not made with guidance 4 alone"):
        objective.loss(game, stored(VP, "epsilon", mixed), Step(0))


class Shift(nn.Module):
    """A student that is the Gaussian of mean a + b w."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))


def shifting(network: Shift) -> Denoiser:
    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(VP, VP.t_from_model_time(model_time), x_t)
        m = shaped(module.a + module.b * condition.tensors["guidance"], x_t)
        return levels.sigma * (x_t - levels.alpha * m) / (levels.alpha**2 * STD**2 + levels.sigma**2)

    view = Denoiser(call, OwnWeights(network), VP, "epsilon")
    network.requires_grad_(True)
    return view


def test_the_loss_and_its_gradient_are_those_of_the_closed_form() -> None:
    """eps differs by (alpha sigma / v) (m_w - a - b w); the teacher gets no gradient."""
    scales, network = torch.linspace(1.0, 6.0, 64, dtype=torch.float64), Shift()
    batch = stored(VP, "epsilon", scales)
    assert batch.visited is not None
    levels = Levels.at(VP, batch.visited.t, batch.visited.x_t)
    k = (levels.alpha * levels.sigma / (levels.alpha**2 * STD**2 + levels.sigma**2)).flatten()
    gap = torch.as_tensor(mean_of(scales))
    objective = GuidanceDistillation((1.0, 6.0), embed_guidance=True, learn_on="states")
    loss = objective.loss(roles(VP, "epsilon", shifting(network)), batch, Step(0)).total
    loss.backward()
    assert loss.item() == pytest.approx((k * gap).square().mean().item(), rel=1e-12)
    assert network.a.grad is not None and network.b.grad is not None
    assert network.a.grad.item() == pytest.approx((-2 * k**2 * gap).mean().item(), rel=1e-12)
    assert network.b.grad.item() == pytest.approx((-2 * k**2 * gap * scales).mean().item(), rel=1e-12)


def test_what_is_affine_in_the_scale_is_right_outside_of_the_range_too() -> None:
    network = Shift()
    game, objective = roles(VP, "epsilon", shifting(network)), GuidanceDistillation((1.0, 6.0), embed_guidance=True)
    optimizer = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure() -> Tensor:
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = objective.loss(game, data(), Step(0)).total
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    for scale in (1.0, 6.0, 12.0):
        assert (network.a + network.b * scale).item() == pytest.approx(float(mean_of(scale)), abs=1e-4)


def test_the_teacher_is_asked_outside_of_the_graph_and_images_are_noised_anew() -> None:
    network, seen = Shift(), []
    teacher = exact(VP, "epsilon", label, STD)

    class Noting(Denoiser):
        def guided(self, x_t: Tensor, *args: Any) -> Any:
            seen.append((x_t, torch.is_grad_enabled()))
            return teacher.guided(x_t, *args)

    game: Any = Roles({"teacher": Noting(teacher._call, teacher.weights, VP, "epsilon"), "student": shifting(network)})
    for _ in range(2):
        GuidanceDistillation((1.0, 6.0), embed_guidance=True).loss(game, data(), Step(0))
        torch.manual_seed(torch.initial_seed() + 1)
    assert [enabled for _, enabled in seen] == [False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": (5.0, 2.0)}, "is no range"),
        ({"guidance": (2.0, 5.0)}, "can learn one alone"),
        ({"call_guidance": 2.0}, "call_guidance is for students that take"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceDistillation(**options)


def test_students_keep_the_teachers_scheduler_and_are_called_once_a_step() -> None:
    even = (999, 749, 499, 249)
    assert GuidanceDistillation(steps=4).inference() == InferenceSpec(even, "own")
    told = GuidanceDistillation((2.0, 5.0), embed_guidance=True, steps=4)
    assert told.inference() == InferenceSpec(even, "own", guidance_scale=3.5, embeds_guidance=True)
    assert told.roles() == {"teacher": Frozen(), "student": Trained(embeds_guidance=True)}
    adapter = AdapterSettings("offset", 8)
    agd = AGD("offset", 8, call_guidance=2.0, steps=4)
    assert agd.inference() == InferenceSpec(even, "own", 2.0, embeds_guidance=True, adapter=adapter)
    assert agd.roles() == {"teacher": Frozen(), "student": Trained(adapter=adapter)}
    assert [phase.stream for phase in (*agd.phases(0), *told.phases(0))] == ["states", "images"]


# ---- the objective `agd` -------------------------------------------------------------------------------------------


def beside_the_exact_network(adapter: GuidanceAdapter) -> Denoiser:
    """The conditional teacher, and an adapter that adds to its noise; x is its one token."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(VP, VP.t_from_model_time(model_time), x_t)
        m = shaped(label(condition), x_t)
        base = levels.sigma * (x_t - levels.alpha * m) / (levels.alpha**2 * STD**2 + levels.sigma**2)
        told = adapter.tell(condition.tensors["guidance"], [get_timestep_embedding(model_time, 32)], None)
        return base + adapter.added(0, x_t[:, None], told)[:, 0]

    return Denoiser(call, OwnWeights(adapter), VP, "epsilon")


def places(count: int, low: float, high: float) -> Batch:
    """Anywhere on the timesteps, with scales from a range; a batch of the states stream."""
    x_t, index = torch.randn(count, 1, dtype=torch.float64), torch.randint(1000, (count,))
    scales, t = low + (high - low) * torch.rand(count, dtype=torch.float64), VP.t_from_model_time(index)
    batch = batch_of(x_t, WITH, WITHOUT)
    levels = Levels.at(VP, t, x_t)
    variance = levels.alpha**2 * STD**2 + levels.sigma**2
    native = levels.sigma * (x_t - levels.alpha * shaped(torch.as_tensor(mean_of(scales)), x_t)) / variance
    object.__setattr__(batch, "visited", Visited(x_t, t, scales, native))
    return batch


def relative_loss(objective: AGD, adapter: GuidanceAdapter, batch: Batch) -> float:
    """The loss beside that of an adapter that adds nothing."""
    place = batch.visited
    assert place is not None
    bare = exact(VP, "epsilon", label, STD)(place.x_t, place.t, batch.condition).native
    game: Any = Roles({"student": beside_the_exact_network(adapter)})
    return float(objective.loss(game, batch, Step(0)).total / (bare - place.native).square().mean())


def learn(adapter: GuidanceAdapter, loss: Callable[[Step], Tensor], steps: int = 300) -> None:
    adapter.requires_grad_(True)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(Step(step)).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("proportional", [False, True])
def test_an_offset_learns_the_exact_correction(proportional: bool) -> None:
    torch.manual_seed(0)
    objective = AGD("offset", 32, frequency=0.1, proportional=proportional)
    adapter = GuidanceAdapter(objective.adapter, AttentionShape((("x", 1),), (32,), None))
    assert relative_loss(objective, adapter, places(256, 1.0, 6.0)) == pytest.approx(1.0, abs=1e-12)
    game: Any = Roles({"student": beside_the_exact_network(adapter)})
    learn(adapter, lambda step: objective.loss(game, places(256, 1.0, 6.0), step).total)
    with torch.no_grad():
        assert relative_loss(objective, adapter, places(4000, 1.0, 6.0)) < 1e-3
        if proportional:
            assert relative_loss(objective, adapter, places(4000, 8.0, 12.0)) < 0.02, "beyond what it was trained on"


@pytest.mark.parametrize("learn_on", ["images", "pairs"])
def test_an_adapter_learns_as_much_where_samples_are_noised(learn_on: Any) -> None:
    """Scales 1 to 6, any noise level: the correction is known there, and the teacher is asked for it."""
    torch.manual_seed(0)
    objective = AGD("offset", 32, frequency=0.1, proportional=True, learn_on=learn_on, guidance=(1.0, 6.0))
    assert [phase.stream for phase in objective.phases(0)] == [learn_on]
    adapter = GuidanceAdapter(objective.adapter, AttentionShape((("x", 1),), (32,), None))
    teacher = exact(VP, "epsilon", label, STD)
    game: Any = Roles({"teacher": teacher, "student": beside_the_exact_network(adapter)})
    untrained = sum(float(objective.loss(game, data(256), Step(i)).total) for i in range(4)) / 4
    learn(adapter, lambda step: objective.loss(game, fresh(256), step).total)
    with torch.no_grad():
        assert float(objective.loss(game, fresh(4000), Step(0)).total) < 1e-3 * untrained
        assert relative_loss(AGD("offset", 32), adapter, places(4000, 1.0, 6.0)) < 1e-2, "and on stored states too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": (1.0, 4.0)}, "scales of their paths"),
        ({"learn_on": "images"}, "learn_on: images needs guidance"),
        ({"learn_on": "pairs"}, "learn_on: pairs needs guidance"),
    ],
)
def test_scales_belong_to_noised_samples_alone(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AGD(**options)


@pytest.mark.parametrize("weighting", ["native", "truncated_snr", "snr_plus_one"])
def test_the_loss_is_the_mean_squared_error_of_the_noise(weighting: Any) -> None:
    torch.manual_seed(0)
    adapter = GuidanceAdapter(AdapterSettings("attention", 8), AttentionShape((("x", 1),), (32,), None))
    batch = places(64, 1.0, 6.0)
    place = batch.visited
    assert place is not None
    game: Any = Roles({"student": beside_the_exact_network(adapter)})
    loss = AGD("attention", 8, weighting=weighting).loss(game, batch, Step(0)).total
    levels = Levels.at(VP, place.t, place.x_t)
    noise = (levels.sigma / levels.alpha) ** 2  # and so much more is an error of the noise one of the clean sample
    weight = {"native": noise**0, "truncated_snr": noise.clamp(min=1), "snr_plus_one": 1 + noise}[weighting]
    k = levels.alpha * levels.sigma / (levels.alpha**2 * STD**2 + levels.sigma**2)
    gap = (place.guidance - 1)[:, None] * k * (WITH - WITHOUT)
    assert loss.item() == pytest.approx((weight * gap.square()).mean().item(), rel=1e-12)


@pytest.mark.parametrize(("schedule", "kind"), TEACHERS)
def test_the_correction_does_not_depend_on_where_one_is(schedule: NoiseSchedule, kind: str) -> None:
    x_t, t = torch.randn(8, 1, dtype=torch.float64), times_of(0.4).expand(8)
    batch = batch_of(x_t, WITH, WITHOUT)
    teacher = exact(schedule, kind, label, STD)
    guided = teacher.guided(x_t, t, batch.condition, batch.null, 4.0).eps
    levels = Levels.at(schedule, t, x_t)
    k = levels.alpha * levels.sigma / (levels.alpha**2 * STD**2 + levels.sigma**2)
    torch.testing.assert_close(guided - teacher(x_t, t, batch.condition).eps, -3.0 * k * (WITH - WITHOUT),
                               rtol=0, atol=1e-12)  # fmt: skip
