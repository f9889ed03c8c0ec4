"""sCM against closed forms: exact consistency maps are its fixed points, and its gradient is the formula's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters import LoraSettings
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.base import Batch, Head, InferenceSpec, Step
from stepdistill.objectives.scm import SCM, Point
from stepdistill.prediction import Levels, native_target
from stepdistill.schedule import FlowSchedule, NoiseSchedule, TrigFlowSchedule, from_scheduler_config
from stepdistill.trigflow import LogWeight, TrigFlow
from tests.oracles.oracle import Roles, mixture, shaped
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


SD, _ = from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
VIEWS: dict[str, tuple[NoiseSchedule, str]] = {
    "epsilon": (SD, "epsilon"),
    "v": (SD, "v_prediction"),
    "flow": (FlowSchedule(), "flow"),
    "shifted flow": (FlowSchedule(3.0), "flow"),
    "trigflow": (TrigFlowSchedule(), "v_prediction"),
}
EVERY = pytest.mark.parametrize(("schedule", "kind"), VIEWS.values(), ids=VIEWS.keys())
STD = 0.7
WARM = Step(index=10**6)  # after any warm-up
COLD = Step(index=0)
NARROW = {
    "time_mean": -0.4,
    "time_std": 0.6,
}  # between the knots at the ends of a table, where a derivative has two sides


def view(schedule: NoiseSchedule, kind: str, x0_of: Callable[[Tensor, Levels, Condition], Tensor]) -> Denoiser:
    """A denoiser with a given clean prediction and the noise that belongs to it."""

    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        levels = Levels.at(schedule, schedule.t_from_model_time(model_time), x_t)
        x0 = x0_of(x_t, levels, condition)
        return native_target(kind, x0, (x_t - levels.alpha * x0) / levels.sigma, levels)

    return Denoiser(call, OwnWeights(nn.Module()), schedule, kind)


def mean_of(condition: Condition) -> Tensor:
    return condition.tensors["label"][:, None]


def teacher_of(schedule: NoiseSchedule, kind: str, std: float = STD) -> Denoiser:
    """The exact denoiser of N(label, std^2)."""

    def x0_of(x_t: Tensor, at: Levels, condition: Condition) -> Tensor:
        m, v = mean_of(condition), at.alpha**2 * std**2 + at.sigma**2
        return m + at.alpha * std**2 / v * (x_t - at.alpha * m)

    return view(schedule, kind, x0_of)


def map_of(
    schedule: NoiseSchedule, kind: str, std: float = STD, mean: Callable[[Condition], Tensor] = mean_of
) -> Denoiser:
    """The exact consistency map of N(label, std^2): m + s / sqrt(v) (x - alpha m)."""

    def x0_of(x_t: Tensor, at: Levels, condition: Condition) -> Tensor:
        m, v = mean(condition), at.alpha**2 * std**2 + at.sigma**2
        return m + std / v.sqrt() * (x_t - at.alpha * m)

    return view(schedule, kind, x0_of)


class WithWeighting(Roles):
    """Denoisers, and a head that knows nothing of features."""

    def __init__(self, student: Denoiser, teacher: Denoiser, bias: float = 0.0) -> None:
        super().__init__({"student": student, "teacher": teacher})
        self.module = LogWeight()
        nn.init.constant_(self.module.bias, bias)

    def head(self, role: str) -> WithWeighting:
        assert role == "weighting"
        return self


def images(count: int = 32, label: float = 0.4, null: float = 0.0, width: int = 3, std: float = STD) -> Batch:
    torch.manual_seed(0)
    x0 = label + std * torch.randn(count, width, dtype=torch.float64)
    rows = torch.full((count,), label, dtype=torch.float64)
    return Batch(
        Condition({"label": rows}), Condition({"label": torch.full_like(rows, null)}), (width,), x0.device, x0
    )


def tangent(objective: SCM, cast: Any, batch: Batch, step: Step = WARM) -> tuple[Tensor, Point]:
    torch.manual_seed(1)
    point = objective.draw(objective.trigflow(cast), batch)
    return objective.tangent(cast, batch, point, step), point


# ---- fixed points --------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_the_tangent_vanishes_at_the_exact_consistency_map(
    schedule: NoiseSchedule, kind: str, data_std: float
) -> None:
    roles = Roles({"student": map_of(schedule, kind), "teacher": teacher_of(schedule, kind)})
    g, point = tangent(SCM(data_std=data_std, **NARROW), roles, images())
    assert point.angle.max() - point.angle.min() > 0.8
    assert g.abs().max().item() < 1e-11
    # ... and only with all its terms
    assert tangent(SCM(data_std=data_std, **NARROW), roles, images(), COLD)[0].abs().max().item() > 1e-3


def test_for_data_of_unit_spread_the_map_is_minus_tan_of_half_the_angle() -> None:
    """F = 0 is then the teacher, whose tangent is -cos sin x; F = -tan(angle / 2) x is the map."""
    schedule, batch = TrigFlowSchedule(), images(label=0.0, std=1.0)

    def linear(factor: Callable[[Tensor], Tensor]) -> Denoiser:
        def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            return shaped(factor(model_time), x_t) * x_t

        return Denoiser(call, OwnWeights(nn.Module()), schedule, "v_prediction")

    teacher = linear(torch.zeros_like)
    g, _ = tangent(SCM(), Roles({"student": linear(lambda a: -(a / 2).tan()), "teacher": teacher}), batch)
    assert g.abs().max().item() < 1e-13
    g, point = tangent(SCM(), Roles({"student": teacher, "teacher": teacher}), batch)
    expected = -0.5 * shaped(point.angle.cos() * point.angle.sin(), point.x) * point.x  # in units of sigma_d
    torch.testing.assert_close(g, expected, rtol=0, atol=1e-13)


@EVERY
def test_before_the_warm_up_the_teacher_itself_is_the_fixed_point(schedule: NoiseSchedule, kind: str) -> None:
    teacher = teacher_of(schedule, kind)
    roles = Roles({"student": teacher, "teacher": teacher})
    assert tangent(SCM(**NARROW), roles, images(), COLD)[0].abs().max().item() == 0.0
    half, full = (tangent(SCM(warmup_steps=100, **NARROW), roles, images(), Step(index=i))[0] for i in (50, 100))
    torch.testing.assert_close(half, full / 2, rtol=0, atol=1e-14)
    assert full.abs().max().item() > 1e-2
    assert torch.equal(tangent(SCM(warmup_steps=0, **NARROW), roles, images(), COLD)[0], full)


@pytest.mark.parametrize("embed", [True, False])
def test_the_fixed_point_is_the_map_of_the_guided_teacher_at_every_samples_own_scale(embed: bool) -> None:
    """Guided Gaussians have the mean m_null + w (m - m_null); a student that is told w can know it."""
    label, null, schedule = 1.0, -0.5, FlowSchedule()

    def guided_mean(condition: Condition) -> Tensor:
        scale = condition.tensors["guidance"][:, None] if "guidance" in condition.tensors else 3.0
        return null + scale * (label - null)

    def unguided(*args: Any) -> Tensor:
        assert "guidance" not in args[3].tensors, "the teacher is guided, it is not told how"
        return teacher._call(*args)

    teacher = teacher_of(schedule, "flow")
    roles = Roles({
        "student": map_of(schedule, "flow", mean=guided_mean),
        "teacher": Denoiser(unguided, OwnWeights(nn.Module()), schedule, "flow"),
    })  # fmt: skip
    batch = images(label=label, null=null)
    objective = SCM(guidance=(1.5, 4.5) if embed else 3.0, embed_guidance=embed)
    g, point = tangent(objective, roles, batch)
    assert g.abs().max().item() < 1e-11
    if embed:
        assert 1.5 <= point.guidance.min() < 2 and 4 < point.guidance.max() <= 4.5


def test_differences_find_the_quantile_map_of_a_mixture_to_be_a_fixed_point() -> None:
    """In one dimension the flow keeps the order, so its map is the inverse of one distribution after the other."""
    weights, means, std = torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), 0.4

    def distribution(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        z = (x - alpha * means.flatten()) / (alpha**2 * std**2 + sigma**2).sqrt()
        return (weights * torch.special.ndtr(z)).sum(1, keepdim=True)

    def quantile(x_t: Tensor, at: Levels, condition: Condition) -> Tensor:
        rank = distribution(x_t, at.alpha, at.sigma)
        one, low, high = torch.ones_like(x_t), torch.full_like(x_t, -6.0), torch.full_like(x_t, 6.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = distribution(middle, one, 0 * one) < rank
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    schedule = FlowSchedule()
    roles = Roles({"student": view(schedule, "epsilon", quantile), "teacher": mixture(weights, means, std, schedule)})
    torch.manual_seed(2)
    x0 = torch.where(torch.rand(64, 1) < 0.3, -1.0, 1.5).double() + std * torch.randn(64, 1, dtype=torch.float64)
    batch = Batch(Condition({"label": x0[:, 0]}), Condition({"label": x0[:, 0]}), (1,), x0.device, x0)
    g, _ = tangent(SCM(difference=1e-5, **NARROW), roles, batch)
    assert g.abs().max().item() < 1e-7
    still = Roles({"student": roles.denoiser("teacher"), "teacher": roles.denoiser("teacher")})
    assert tangent(SCM(**NARROW), still, batch)[0].abs().max().item() > 0.05


def test_consistency_training_has_the_tangent_of_distillation_on_average() -> None:
    """x0 given x is Gaussian and the tangent is linear in it: two points have the mean of all."""
    schedule, s, m, (batch, labels) = FlowSchedule(), STD, 0.4, (images(), images().condition)
    roles = Roles({"student": map_of(schedule, "flow", std=1.3), "teacher": teacher_of(schedule, "flow")})
    distilled, point = tangent(SCM(), roles, batch)
    cos, sin = shaped(point.angle.cos(), point.x), shaped(point.angle.sin(), point.x)
    v = cos**2 * s**2 + sin**2
    expected_x0, spread = m + cos * s**2 / v * (point.x - cos * m), s * sin / v.sqrt()
    trained = []
    for sign in (1, -1):
        x0 = expected_x0 + sign * spread
        given = Batch(labels, labels, batch.latent_shape, batch.device, x0)
        eps = (point.x - cos * x0) / sin
        trained.append(SCM(velocity="data").tangent(
            roles, given, Point(point.x, point.angle, eps, point.guidance, labels), WARM
        ))  # fmt: skip
    assert (trained[0] - trained[1]).abs().max().item() > 0.1
    torch.testing.assert_close((trained[0] + trained[1]) / 2, distilled, rtol=0, atol=1e-11)


# ---- the loss ------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """F = c h(x, angle) on TrigFlow's own schedule."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))

    def view(self, kind: str = "v_prediction") -> Denoiser:
        def call(network: Any, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            return network.c * torch.sin(x_t + shaped(model_time, x_t))

        denoiser = Denoiser(call, OwnWeights(self), TrigFlowSchedule(), kind)
        self.requires_grad_(True)
        return denoiser


@pytest.mark.parametrize("norm", ["rms", "l2", "none"])
@pytest.mark.parametrize("prior", [True, False])
def test_the_gradient_is_minus_two_weights_times_the_tangent(norm: str, prior: bool) -> None:
    network, batch, bias = Scaled(0.3), images(), 0.6
    roles = WithWeighting(network.view(), teacher_of(TrigFlowSchedule(), "v_prediction"), bias)
    objective = SCM(tangent_norm=norm, prior_weight=prior)  # type: ignore[arg-type]
    g, point = tangent(objective, roles, batch)
    size = {"l2": g.square().sum(1), "rms": g.square().mean(1)}.get(norm)
    scaled = g if size is None else g / (size.sqrt()[:, None] + 0.1)
    weight = torch.exp(torch.tensor(bias)) / (0.5 * point.angle.tan() if prior else 1)
    h = torch.sin(point.x + point.angle[:, None])
    torch.manual_seed(1)
    loss = objective.loss(roles, batch, WARM)
    loss.total.backward()
    assert network.c.grad.item() == pytest.approx((-2 * weight * (h * scaled).mean(1)).mean().item(), rel=1e-6)
    expected = (weight * scaled.square().mean(1)).mean().item() - bias
    assert loss.total.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_best_weight_is_the_reciprocal_of_the_error() -> None:
    network, batch, objective = Scaled(0.3), images(), SCM(tangent_norm="none")
    teacher = teacher_of(TrigFlowSchedule(), "v_prediction")
    plain = SCM(tangent_norm="none", adaptive=False)
    torch.manual_seed(1)
    error = plain.loss(Roles({"student": network.view(), "teacher": teacher}), batch, WARM).total.item()
    for bias, sign in ((-1.0, -1), (1.0, 1)):
        roles = WithWeighting(network.view(), teacher, bias - torch.tensor(error).log().item())
        torch.manual_seed(1)
        objective.loss(roles, batch, WARM).total.backward()
        assert sign * roles.module.bias.grad.item() > 0.5
    roles = WithWeighting(network.view(), teacher, -torch.tensor(error).log().item())
    torch.manual_seed(1)
    objective.loss(roles, batch, WARM).total.backward()
    assert abs(roles.module.bias.grad.item()) < 1e-6


def test_neither_teacher_nor_target_gets_a_gradient() -> None:
    student, teacher = Scaled(0.3), Scaled(0.9)
    roles = WithWeighting(student.view(), teacher.view())
    loss = SCM().loss(roles, images(), WARM)
    assert all(not value.requires_grad for value in loss.logged.values())
    loss.total.backward()
    assert teacher.c.grad is None
    assert student.c.grad is not None and roles.module.bias.grad is not None


def test_a_network_that_predicts_the_clean_sample_is_refused() -> None:
    roles = WithWeighting(Scaled(0.3).view("sample"), Scaled(0.3).view("sample"))
    with pytest.raises(UserError, match="scm needs a network that predicts noise or a velocity"):
        SCM().loss(roles, images(), WARM)


class Curve(nn.Module):
    """F = k(angle) x + b(angle) with polynomials k and b, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2, 6, dtype=torch.float64))

    def call(self, network: Any, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        powers = (model_time / 1.2)[:, None] ** torch.arange(6)
        factor, offset = (powers @ network.coefficients.T).unbind(1)
        return shaped(factor, x_t) * x_t + shaped(offset, x_t)


def test_training_ends_at_the_exact_map_of_the_teacher() -> None:
    network, schedule, m = Curve(), TrigFlowSchedule(), 0.4
    student = Denoiser(network.call, OwnWeights(network), schedule, "v_prediction")
    network.requires_grad_(True)
    roles = WithWeighting(student, teacher_of(schedule, "v_prediction"))
    objective, steps = SCM(warmup_steps=50, time_std=1.2, tangent_norm="rms"), 300
    optimizer = torch.optim.Adam([*network.parameters(), *roles.module.parameters()], lr=0.05, betas=(0.9, 0.99))
    x0 = m + STD * torch.randn(256, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = Condition({"label": torch.full((256,), m, dtype=torch.float64)})
    batch = Batch(labels, labels, (1,), x0.device, x0)
    torch.manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        objective.loss(roles, batch, Step(step)).total.backward()
        optimizer.step()
    trig, angle = TrigFlow(schedule), torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(4, 1)
    at = (*trig.place(x, angle.repeat_interleave(2)), labels[:8])
    with torch.no_grad():
        torch.testing.assert_close(student(*at).x0, map_of(schedule, "v_prediction")(*at).x0, rtol=0, atol=0.03)


# ---- the game ------------------------------------------------------------------------------------------------------


def test_its_roles_turns_and_way_of_being_called() -> None:
    assert set(SCM().roles()) == {"teacher", "student", "weighting"}
    assert isinstance(SCM().roles()["weighting"], Head)
    assert set(SCM(adaptive=False).roles()) == {"teacher", "student"}
    turns = [(p.name, p.updates, p.stream, p.repeats) for p in SCM().phases(0)]
    assert turns == [("student", ("student", "weighting"), "images", 1)]
    assert SCM(adaptive=False).phases(0)[0].updates == ("student",)
    assert SCM(timesteps=(999, 499)).inference() == InferenceSpec((999, 499))
    told = SCM(guidance=(2.0, 4.0), embed_guidance=True)
    assert told.roles()["student"].embeds_guidance and not SCM().roles()["student"].embeds_guidance
    assert told.inference() == InferenceSpec((999,), guidance_scale=3.0, embeds_guidance=True)


@pytest.mark.parametrize("option", ["sigma_d", "data_std", "time_std", "warmup_steps", "norm_constant", "difference"])
def test_impossible_options_are_named(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} must"):
        SCM(**{option: -1})


@pytest.mark.parametrize(
    ("which", "lora", "options"),
    [
        ("sd", False, {}),
        ("sd", True, {"difference": 1e-4}),
        ("sd", False, {"guidance": (1.0, 3.0), "embed_guidance": True}),
        ("sd3", False, {"prior_weight": True, "tangent_norm": "l2"}),
        ("sd3", True, {"velocity": "data"}),
    ],
    ids=["sd", "sd lora differences", "sd guidance embedded", "sd3", "sd3 lora data"],
)
def test_real_networks_learn_student_and_weighting_alone(
    which: str, lora: bool, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    family = load_family(request.getfixturevalue(f"{which}_folder"))
    objective = SCM(warmup_steps=1, **{"guidance": 2.0, **options})
    targets = LORA if which == "sd" else LoraSettings(rank=2, alpha=4.0, targets=("to_q", "to_k", "ff.net.2"))
    trainer = trainer_of(family, objective, lora={"student": targets} if lora else {}, steps=2)
    trainer.batches.latents = PaintedLatents()
    before, frozen = weights_of(trainer), [p.detach().clone() for p in family.network().parameters()]
    trainer.run()
    after = weights_of(trainer)
    moved = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"student", "weighting"}
    assert all(torch.isfinite(value).all() for value in after.values())
    if not lora:
        assert all(torch.equal(a, b) for a, b in zip(frozen, family.network().parameters(), strict=True))
