"""Progressive distillation on Gaussians: where one step has to aim, what halving after halving adds up to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from stepdistill import finish
from stepdistill.cast import Cast
from stepdistill.checkpoint import load_tree, tensors_equal
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.losses import line_x0, progressive_weight
from stepdistill.objectives.base import Batch, InferenceSpec, Recorded, Role, Step
from stepdistill.objectives.inputs import draw_paths, draw_times, few_step_input, subdivided, walk
from stepdistill.objectives.progressive import Progressive
from stepdistill.prediction import Levels, Prediction, native_target
from stepdistill.recipe import Recipe
from stepdistill.run import export, train
from stepdistill.sampling import ddim_step
from stepdistill.schedule import NoiseSchedule
from stepdistill.times import grid, trailing
from tests.oracles.exact import TEACHERS, exact, level, times_of
from tests.oracles.oracle import Linear, Roles, constant, four_signs, label, linear_student
from tests.oracles.trajectories import FLOW, STD, VP, images, slope
from tests.tiny import LORA, PaintedLatents, tiny_recipe, trainer_of, weights_of


CPU = torch.device("cpu")


# ---- where one step has to aim -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "kind"), TEACHERS)
@pytest.mark.parametrize("path", [(0.5, 0.375, 0.25), (1.0, 0.75, 0.5), (0.25, 0.125, 0.0)])
def test_one_step_towards_the_target_ends_where_two_of_the_teachers_ended(
    schedule: NoiseSchedule, kind: str, path: tuple[float, ...]
) -> None:
    teacher = exact(schedule, kind, constant(0.0), STD)
    torch.manual_seed(0)
    x_t = torch.randn(16, 1, dtype=torch.float64)
    rows = times_of(*path).expand(16, 3)
    x_s = walk(teacher, x_t, rows, images(x_t, x_t), 1.0)
    first, second, last = (level(schedule, t) for t in path)
    both = slope(first, second) * slope(second, last)
    torch.testing.assert_close(x_s, both * x_t, rtol=0, atol=1e-12)

    x0 = line_x0(x_t, x_s, first, last)
    ratio = last.sigma / first.sigma
    torch.testing.assert_close(x0, (both - ratio) / (last.alpha - ratio * first.alpha) * x_t, rtol=0, atol=1e-12)
    wide = Levels.at(schedule, rows[:, 0], x_t)
    again = ddim_step(teacher, Prediction(native_target(kind, x0, _noise(x_t, x0, wide), wide), kind, x_t, wide),
                      rows[:, -1])  # fmt: skip
    torch.testing.assert_close(again, x_s, rtol=0, atol=1e-12)


def _noise(x_t: Tensor, x0: Tensor, levels: Levels) -> Tensor:
    return (x_t - levels.alpha * x0) / levels.sigma


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_a_step_to_clean_data_aims_at_its_end_bit_by_bit(schedule: NoiseSchedule) -> None:
    x_t, x_s = torch.randn(2, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(line_x0(x_t, x_s, level(schedule, 0.3), level(schedule, 0.0)), x_s)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_native_weight_makes_the_error_of_the_clean_sample_that_of_the_output(kind: str) -> None:
    schedule = FLOW if kind == "flow" else VP
    torch.manual_seed(0)
    x_t, said, wanted = torch.randn(3, 5, 1, dtype=torch.float64)
    levels = Levels.at(schedule, times_of(0.1, 0.3, 0.5, 0.7, 0.9), x_t)
    error = (Prediction(said, kind, x_t, levels).x0 - Prediction(wanted, kind, x_t, levels).x0).square()
    weight = progressive_weight(levels, kind, "native")
    torch.testing.assert_close(weight[:, None] * error, (said - wanted).square(), rtol=1e-9, atol=0)


def test_the_papers_weights_grow_with_the_signal_and_never_fall_below_one() -> None:
    levels = Levels.at(VP, times_of(0.05, 0.5, 1.0), torch.zeros(3, 1))
    snr = (levels.alpha / levels.sigma).flatten() ** 2
    assert snr[0] > 10 > 1 > snr[2]
    assert progressive_weight(levels, "epsilon", "truncated_snr").tolist() == [snr[0], max(snr[1], 1), 1]
    assert torch.equal(progressive_weight(levels, "epsilon", "snr_plus_one"), snr + 1)


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "kind"), TEACHERS)
def test_the_gradient_is_that_of_the_closed_form_and_vanishes_at_the_optimum(
    exact_noise: Tensor, schedule: NoiseSchedule, kind: str
) -> None:
    """One step from the middle: the student sees noise alone, sigma eps, and eps^2 = 1."""
    start, half, end = (level(schedule, t) for t in (0.5, 0.25, 0.0))
    wanted = (slope(start, half) * slope(half, end)).item()
    snr = (start.alpha / start.sigma).item() ** 2
    objective = Progressive((499,), weighting="snr_plus_one")
    for a in (wanted + 0.3, wanted):
        network = Linear(a, 0.0)
        roles: Any = Roles({"teacher": exact(schedule, kind, constant(0.0), STD),
                            "student": linear_student(network, schedule)})  # fmt: skip
        loss = objective.loss(roles, images(exact_noise, exact_noise), Step(0))
        variance = start.sigma.item() ** 2
        assert loss.total.item() == pytest.approx((snr + 1) * (a - wanted) ** 2 * variance, abs=1e-12)
        loss.total.backward()
        assert network.a.grad.item() == pytest.approx(2 * (snr + 1) * (a - wanted) * variance, abs=1e-12)
        assert network.b.grad.item() == pytest.approx(0, abs=1e-12)


def test_guidance_is_that_of_the_shifted_gaussian() -> None:
    """Conditional mean 1, unconditional 0: at scale 3 the teacher is exactly that of the mean 3."""
    network = Linear(0.4, 0.1)
    losses = []
    for mean, guidance in ((label, 3.0), (constant(3.0), 1.0)):
        roles: Any = Roles({"teacher": exact(VP, "epsilon", mean, STD), "student": linear_student(network, VP)})
        torch.manual_seed(1)
        batch = images(*torch.randn(2, 64, 1, dtype=torch.float64), label=1.0)
        losses.append(Progressive(guidance=guidance).loss(roles, batch, Step(0)).total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


class PerTime(nn.Module):
    """x0 = c_k x at the time k / 4."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.full((5,), 0.2, dtype=torch.float64))


class Numbers(Cast):
    """A cast without a pipeline: students of one number per time, and an exact teacher."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            return module.c[(4 * VP.t_from_model_time(model_time)).round().long()][:, None] * x_t

        self.family = SimpleNamespace(denoiser=lambda weights: Denoiser(call, weights, VP, "sample"))  # type: ignore[assignment]
        self._weights = {name: OwnWeights(PerTime()) for name in roles}
        self._heads, self._names, self.parked = {}, {}, {}

    def denoiser(self, role: str) -> Denoiser:
        return exact(VP, "epsilon", constant(0.0), STD) if role == "teacher" else super().denoiser(role)


def test_halving_after_halving_the_student_makes_in_one_step_what_the_teacher_made_in_four() -> None:
    objective = Progressive((999,), halvings=2, halving_steps=1)
    cast = Numbers(objective.roles())
    (c,) = cast.parameters("student").values()
    torch.manual_seed(0)
    batch = images(STD * torch.randn(256, 1, dtype=torch.float64), torch.zeros(256, 1, dtype=torch.float64))
    slopes = [slope(level(VP, t / 4), level(VP, (t - 1) / 4)).item() for t in (4, 3, 2, 1)]
    product = slopes[0] * slopes[1] * slopes[2] * slopes[3]
    ends = []
    for step in range(3):
        with cast.trainable(("student",)):
            loss = objective.loss(cast, batch, Step(step))
            (gradient,) = torch.autograd.grad(loss.total, c, create_graph=True)
            (curvature,) = torch.autograd.grad(gradient.sum(), c)
        with torch.no_grad():  # quadratic, each time on its own: one step of Newton's is exact
            c -= torch.where(curvature > 0, gradient / curvature.clamp(min=1e-12), 0)
        ends.append((loss.logged["student_steps"].item(), _sampled(cast.denoiser("student"), (4, 2))))
        objective.after_step(cast, step)
    assert [count for count, _ in ends] == [2.0, 1.0, 1.0]
    assert ends[0][1] == pytest.approx(product, abs=1e-12), "two steps after the first halving"
    assert c[4].item() == pytest.approx(product, abs=1e-12), "one after the second"
    exact_slope = STD / (level(VP, 1.0).alpha ** 2 * STD**2 + level(VP, 1.0).sigma ** 2).sqrt().item()
    assert product < exact_slope - 0.05, "that of four steps, not of the exact path"


def _sampled(student: Denoiser, quarters: tuple[int, ...]) -> float:
    """By what the student's deterministic steps multiply noise."""
    x, nothing = torch.ones(1, 1, dtype=torch.float64), Condition({"none": torch.zeros(1)})
    for here, there in zip(quarters, (*quarters[1:], 0), strict=True):
        x = ddim_step(student, student(x, times_of(here / 4), nothing), times_of(there / 4))
    return x.item()


# ---- times and inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_teachers_times_are_those_of_trailing_spacing(steps: int, parts: int) -> None:
    wanted = torch.cat([grid(VP, trailing(VP, steps * parts), CPU), torch.zeros(1, dtype=torch.float64)])
    assert torch.equal(subdivided(VP, trailing(VP, steps), parts, CPU), wanted)


def test_a_flow_is_cut_evenly_and_a_table_only_as_far_as_it_goes() -> None:
    flow = subdivided(FLOW, (999, 499), 3, CPU)
    torch.testing.assert_close(flow, torch.linspace(1, 0, 7, dtype=torch.float64), rtol=0, atol=1e-15)
    with pytest.raises(UserError, match="cannot be cut into 8 each"):
        subdivided(VP, (10, 5), 8, CPU)


def test_paths_begin_at_every_step_of_the_student_alike_and_go_by_the_teachers_places() -> None:
    times = subdivided(FLOW, (999, 749, 499, 249), 2, CPU)
    torch.manual_seed(0)
    paths = draw_paths(times, 2, 4000)
    begun, counts = paths[:, 0].unique(return_counts=True)
    assert begun.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert (counts > 850).all()
    torch.testing.assert_close(paths[:, :1] - paths, torch.tensor([[0, 0.125, 0.25]]).double().expand(4000, 3))


def test_times_are_drawn_with_their_probabilities() -> None:
    times = times_of(1.0, 0.5, 0.25)
    torch.manual_seed(0)
    drawn = draw_times(times, 10_000, (0.7, 0.0, 0.3))
    assert [(drawn == t).double().mean().item() for t in times] == pytest.approx([0.7, 0, 0.3], abs=0.02)
    even = draw_times(times, 9000)
    assert [(even == t).double().mean().item() for t in times] == pytest.approx([1 / 3] * 3, abs=0.02)


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_the_first_input_is_noise_alone_and_the_others_are_noised_data(
    exact_noise: Tensor, schedule: NoiseSchedule
) -> None:
    x0, eps = 5 * exact_noise, four_signs()[1]
    t = times_of(0.75, 0.5, 0.75, 0.25)
    seen = few_step_input(schedule, x0, t, times_of(0.75)[0], "deterministic")
    told = few_step_input(schedule, x0, t, times_of(0.75)[0])
    levels = Levels.at(schedule, t, x0)
    assert torch.equal(seen[[0, 2]], (levels.sigma * eps)[[0, 2]])
    assert torch.equal(told[[0, 2]], eps[[0, 2]])
    for x_t in (seen, told):
        assert torch.equal(x_t[[1, 3]], (levels.alpha * x0 + levels.sigma * eps)[[1, 3]])


# ---- who follows whom, and when ------------------------------------------------------------------------------------


def test_the_roles_and_halvings_are_those_of_the_options() -> None:
    assert set(Progressive().roles()) == {"teacher", "student"}, "one halving from the teacher needs no other"
    assert Progressive(learn_from="student").roles()["previous"] == Recorded(like="student")
    objective = Progressive((999, 499), halvings=3, halving_steps=10)
    assert objective.roles()["previous"] == Recorded(like="student")
    assert [objective.halving(step) for step in (0, 9, 10, 19, 20, 500)] == [0, 0, 1, 1, 2, 2]
    assert objective.inference() == InferenceSpec((999, 499), "deterministic")
    assert [phase.stream for phase in objective.phases(0)] == ["images"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halvings": 0}, "at least 1"),
        ({"halving_steps": 0}, "at least 1"),
        ({"learn_from": "student", "guidance": 3.0}, "has no effect"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Progressive(**options)


@pytest.mark.parametrize("lora", [{}, {"student": LORA}], ids=["full", "lora"])
def test_an_interrupted_run_ends_with_the_same_bits_and_the_student_becomes_the_teacher(
    sd_folder: str, tmp_path: Path, lora: dict[str, Any]
) -> None:
    objective = Progressive((999, 499), halvings=2, halving_steps=2, guidance=2.0)

    def game(steps: int, folder: Path | None = None) -> Any:
        trainer = trainer_of(load_family(sd_folder), objective, lora=lora, steps=steps, folder=folder)
        trainer.batches.latents = PaintedLatents()
        return trainer

    straight, held = game(4), []
    straight.on_step = lambda progress: held.append(
        (progress.losses["student_steps"], weights_of(straight), straight.cast.state("previous").tensors)
    )
    straight.run()
    assert [count for count, _, _ in held] == [4.0, 4.0, 2.0, 2.0]
    student = {name.removeprefix("student/"): value for name, value in held[1][1].items()}
    assert not tensors_equal(student, held[0][2]), "not yet"
    assert tensors_equal(student, held[1][2])
    assert tensors_equal(student, held[3][2]), "and it stays as it was then"

    game(3, tmp_path).run()
    second = game(4, tmp_path)
    second.resume(*second.checkpoints.load(3))
    second.run()
    assert tensors_equal(weights_of(second), weights_of(straight))


def two_halvings(sd_folder: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of four steps => two => one, a stage of two iterations for each."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a")
    content = tiny_recipe(sd_folder, tmp_path / "run", **changes)
    content["data"] |= {"images": str(tmp_path / "images"), "size": 16}
    stages: list[dict[str, Any]] = [
        {"objective": {"name": "progressive", "timesteps": [999, 499], "guidance": 2.0}},
        {"objective": {"name": "progressive", "timesteps": [999], "learn_from": "student"}},
    ]
    player = {"default": {"schedule": "linear", "optimizer": {"lr": 0.01}}}
    content["stages"] = [{**stage, "steps": 2, "batch_size": 2, "players": player} for stage in stages]
    return content


def test_a_stage_can_go_on_from_the_student_of_the_stage_before(sd_folder: str, tmp_path: Path) -> None:
    result = train(Recipe.from_mapping(two_halvings(sd_folder, tmp_path)))
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert ['"student_steps": 2.0' in line for line in lines] == [True, True, False, False]


def test_the_student_of_each_halving_can_be_exported_however_few_checkpoints_are_kept(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "check", lambda *args: 0.0)  # the fresh process has tests of its own
    changes = {"checkpoints": {"every": 1, "keep": 1}, "export": {"pipeline": True, "lora": False}}
    train(Recipe.from_mapping(two_halvings(sd_folder, tmp_path, **changes)))
    run, seen = tmp_path / "run", []
    for stage, timesteps in enumerate([[999, 499], [999]]):
        pipeline = export(run, f"stage-{stage}", tmp_path / f"of-{stage}").pipeline
        assert pipeline is not None
        loaded = StableDiffusionPipeline.from_pretrained(pipeline)
        loaded.scheduler.set_timesteps(len(timesteps))
        assert loaded.scheduler.timesteps.tolist() == timesteps
        student = load_tree(run / "checkpoints" / f"stage-{stage}" / "roles")["student"]["tensors"]
        assert tensors_equal(dict(loaded.unet.named_parameters()), student)
        seen.append(student)
    assert not tensors_equal(*seen)
    for wrong in ("2", "stage-2", "stage-", "stage-00"):
        with pytest.raises(UserError, match=r"no checkpoint .*; it has 4, stage-0, stage-1"):
            export(run, wrong)


def test_the_first_iteration_after_a_stage_follows_that_stages_student(sd_folder: str) -> None:
    family = load_family(sd_folder)
    before = Cast(family, Progressive().roles())
    with torch.no_grad():
        next(iter(before.parameters("student").values())).add_(1.0)
    start = before.state("student")
    after = Cast(family, Progressive(learn_from="student").roles(), starts={"student": start})
    assert tensors_equal(after.state("previous").tensors, start.tensors)


def test_only_the_student_gets_a_gradient(sd_folder: str) -> None:
    trainer = trainer_of(load_family(sd_folder), Progressive(learn_from="student"))
    trainer.batches.latents = PaintedLatents()
    batch: Batch = trainer.batches.next("images", 2)
    with trainer.cast.trainable(("student",)):
        trainer.objective.loss(trainer.cast, batch, Step(0)).total.backward()
    assert any(p.grad is not None for p in trainer.cast.parameters("student").values())
    assert all(p.grad is None for p in trainer.cast.parameters("previous").values())
    assert all(p.grad is None for p in trainer.cast.family.network().parameters())
