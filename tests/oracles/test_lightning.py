"""The adversary with an encoder of its own, and progressive adversarial distillation, where the answer is known."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.discriminator import Discriminator, MapHead, TokenHead, generator_loss
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.base import InferenceSpec, Recorded, Step, Trained
from stepdistill.objectives.encoder_adversary import EncoderAdversary, of_two
from stepdistill.objectives.lightning import Lightning
from stepdistill.objectives.progressive import Progressive
from stepdistill.schedule import NoiseSchedule
from stepdistill.times import grid
from stepdistill.trainer import Trainer
from tests.oracles.exact import TEACHERS, exact, level, times_of
from tests.oracles.oracle import Roles, constant
from tests.oracles.trajectories import STD, VP, images, slope
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


Pair = tuple[Tensor, Tensor]


class Looking:
    """An encoder that shows a sample as it is, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Pair] = []

    def features(self, x: Tensor, t: Tensor, condition: Any, layers: Any) -> list[Tensor]:
        assert len(x) == len(t) == len(condition)
        self.shown.append((x.detach(), t))
        return [x]


class Judging(Roles):
    """Stands in for a cast: an exact teacher that is its own student, an encoder that looks, and a given module."""

    def __init__(self, module: Any, schedule: NoiseSchedule = VP, kind: str = "epsilon", student: Any = None) -> None:
        teacher = exact(schedule, kind, constant(0.0), STD)
        self.encoder: Any = Looking()
        super().__init__({"teacher": teacher, "student": student or teacher, "encoder": self.encoder})
        self.module, self.asked = module, []

    def head(self, role: str) -> Any:
        self.asked.append(role)
        return SimpleNamespace(module=self.module, layers=("all",))

    def renamed(self, names: Any) -> Any:
        view = Judging.__new__(Judging)
        view.__dict__ = {**self.__dict__}
        view.head = lambda role: Judging.head(self, names.get(role, role))  # type: ignore[method-assign]
        return view


class Quadratic(nn.Module):
    """A logit that is any quadratic function of what it is given, float64 inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 + width + width**2, dtype=torch.float64))

    def forward(self, features: list[Tensor]) -> Tensor:
        (x,) = features
        x = x.double()
        products = (x[:, :, None] * x[:, None]).flatten(1)
        return (torch.cat([torch.ones_like(x[:, :1]), x, products], dim=1) @ self.weight)[:, None]


def fitted(conditional: bool, start: Pair, real: Tensor, fake: Tensor, at: Tensor) -> tuple[float, Any]:
    """(Loss, cast) of the best quadratic discriminator, which for Gaussians is the best of all."""
    cast: Any = Judging(Quadratic(2 if conditional else 1))
    game, batch = EncoderAdversary(conditional), images(real, real)
    optimizer = torch.optim.LBFGS(cast.module.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = game.discriminator_term(cast, start if conditional else None, real, fake, at, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item(), cast


def steps() -> tuple[Pair, Tensor, Tensor]:
    """((x_t, t), where the exact path ends, s) for samples that come with their mirror images."""
    z = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = torch.cat([z, -z])
    t, s = (torch.full((len(x_t),), value, dtype=torch.float64) for value in (0.75, 0.5))
    return (x_t, t), slope(level(VP, 0.75), level(VP, 0.5)) * x_t, s


# ---- the adversary -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [True, False])
def test_a_student_that_ends_where_its_teacher_ends_cannot_be_told_apart(conditional: bool) -> None:
    start, real, s = steps()
    loss, cast = fitted(conditional, start, real, real.clone(), s)
    assert loss == pytest.approx(2 * math.log(2), abs=1e-6)
    fake = real.clone().requires_grad_(True)
    term = EncoderAdversary(conditional).student_term(
        cast, start if conditional else None, fake, s, images(real, real)
    )
    (gradient,) = torch.autograd.grad(term, fake)
    assert term.item() == pytest.approx(math.log(2), abs=1e-6)
    assert gradient.abs().max() < 1e-6


def test_the_right_samples_from_the_wrong_starts_are_seen_by_the_conditional_game_only() -> None:
    start, real, s = steps()
    assert fitted(False, start, real, -real, s)[0] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert fitted(True, start, real, -real, s)[0] < 0.1


def test_a_wrong_marginal_is_seen_by_both() -> None:
    start, real, s = steps()
    for conditional in (True, False):
        assert fitted(conditional, start, real, 0.5 * real, s)[0] < 2 * math.log(2) - 0.05


@pytest.mark.parametrize("game", ["non_saturating", "hinge", "least_squares"])
@pytest.mark.parametrize("conditional", [True, False])
def test_the_students_gradient_is_that_of_one_long_graph(game: Any, conditional: bool) -> None:
    torch.manual_seed(0)
    width = 2 if conditional else 1
    network = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
    cast: Any = Judging(lambda features: network(features[0]))
    x_t, x_s = torch.randn(2, 6, 1)
    start, s = (x_t, torch.full((6,), 0.75)), torch.full((6,), 0.5)
    fake = x_s.clone().requires_grad_(True)
    adversary = EncoderAdversary(conditional, game)
    term = adversary.student_term(cast, start if conditional else None, fake, s, images(x_s, x_s))
    (told,) = torch.autograd.grad(term, fake)
    seen = torch.cat([fake, x_t], dim=1) if conditional else fake
    expected = generator_loss(network(seen), game)
    torch.testing.assert_close(term, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(told, torch.autograd.grad(expected, fake)[0], rtol=0, atol=1e-7)


def test_every_place_is_encoded_once_and_at_its_own_time() -> None:
    cast: Any = Judging(Quadratic(2))
    (x_t, t), real, s = steps()
    EncoderAdversary().discriminator_term(cast, (x_t, t), real, -real, s, images(real, real))
    ((x, times),) = cast.encoder.shown
    assert torch.equal(x, torch.cat([real, -real, x_t]))
    assert torch.equal(times, torch.cat([s, s, t]))


def test_the_game_that_needs_real_samples_in_the_students_turn_is_refused() -> None:
    with pytest.raises(UserError, match="relativistic"):
        EncoderAdversary(game="relativistic")
    with pytest.raises(UserError, match="relativistic"):
        Lightning(gan_loss="relativistic")


def test_a_head_of_two_places_has_twice_the_channels() -> None:
    found: Any = of_two([(8, 4, 4), (16, 12)])
    assert isinstance(found.heads[0], MapHead)
    assert isinstance(found.heads[1], TokenHead)
    maps, tokens = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 24)
    assert found([maps, tokens]).shape == (3, 2)
    assert EncoderAdversary().roles()["discriminator"].build is of_two  # type: ignore[union-attr]
    assert EncoderAdversary(conditional=False).roles()["discriminator"].build is Discriminator  # type: ignore[union-attr]
    assert EncoderAdversary().roles()["encoder"] == Trained()


# ---- lightning -----------------------------------------------------------------------------------------------------


class Zero(nn.Module):
    """No opinion, and a note of what it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, features: list[Tensor]) -> Tensor:
        self.seen.append(features[0].detach())
        return 0 * features[0].sum(1, keepdim=True)


@pytest.mark.parametrize(("schedule", "kind"), TEACHERS)
def test_real_is_where_the_teachers_small_steps_end_and_fake_where_the_students_long_one_does(
    schedule: NoiseSchedule, kind: str
) -> None:
    cast: Any = Judging(Zero(), schedule, kind)
    torch.manual_seed(0)
    batch = images(*torch.randn(2, 64, 1))
    for teacher_steps in (1, 4):
        cast.module.seen.clear()
        loss = Lightning((999, 499), teacher_steps).discriminator_loss(cast, batch, Step(0))
        assert loss.total.item() == pytest.approx(2 * math.log(2), abs=1e-6)
        real, fake = cast.module.seen
        assert torch.equal(real[:, 1], fake[:, 1]), "both are judged beside the same start"
        for row in range(64):
            t = cast.encoder.shown[-1][1][128 + row].item()
            places = [level(schedule, t - 0.5 * k / teacher_steps) for k in range(teacher_steps + 1)]
            small = math.prod(slope(a, b).item() for a, b in pairwise(places))
            long = slope(places[0], places[-1]).item()
            assert real[row, 0].item() == pytest.approx(small * real[row, 1].item(), abs=1e-4)
            assert fake[row, 0].item() == pytest.approx(long * real[row, 1].item(), abs=1e-4)
        assert torch.equal(real, fake) == (teacher_steps == 1)


def test_at_the_last_time_the_start_is_noise_alone() -> None:
    cast: Any = Judging(Zero())
    torch.manual_seed(0)
    batch = images(torch.full((512, 1), 1000.0), torch.zeros(512, 1))
    Lightning((999, 499)).discriminator_loss(cast, batch, Step(0))
    (x, t), first = cast.encoder.shown[-1], times_of(1.0)
    begun = x[1024:, 0]
    last = t[1024:] == first
    assert 0.3 < last.double().mean() < 0.7
    assert begun[last].abs().max() < 6 < 100 < begun[~last].abs().min()


def test_ends_are_noised_to_the_given_times_where_these_are_noisier() -> None:
    cast: Any = Judging(Zero())
    torch.manual_seed(0)
    batch = images(STD * torch.randn(20_000, 1, dtype=torch.float64), torch.zeros(20_000, 1))
    objective = Lightning((999, 499), 2, conditional_steps=0, noised_at=(249, 749))
    objective.student_loss(cast, batch, Step(0))
    (_, at), quarters = cast.encoder.shown[-1], grid(VP, (249, 499, 749), torch.device("cpu"))
    found = {t.item(): (at == t) for t in quarters}
    # steps end at 0.5 or 0; they are judged at 0.25 and 0.75, and at 0.5 where 0.25 would be less noise
    assert [rows.double().mean().item() for rows in found.values()] == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    assert sum(rows.sum() for rows in found.values()) == 20_000
    objective.discriminator_loss(cast, batch, Step(0))
    shown, times = cast.encoder.shown[-1]
    real, fake = shown.chunk(2)
    apart = (real != fake).flatten()
    assert apart[times.chunk(2)[0] == 0.25].all(), "each gets noise of its own"


def test_the_first_part_sees_the_start_and_the_second_does_not() -> None:
    objective = Lightning(conditional_steps=10)
    assert [objective.adversary(step).conditional for step in (0, 9, 10, 99)] == [True, True, False, False]
    turns = [[phase.updates for phase in objective.phases(step)] for step in (9, 10)]
    assert turns == [[("encoder", "discriminator"), ("student",)], [("encoder", "unconditional"), ("student",)]]
    assert set(objective.roles()) == {"teacher", "student", "encoder", "discriminator", "unconditional"}
    for steps_, conditional in ((None, True), (0, False)):
        whole = Lightning(conditional_steps=steps_)
        assert whole.adversary(10**6).conditional == conditional
        assert set(whole.roles()) == {"teacher", "student", "encoder", "discriminator"}
        assert whole.phases(10**6)[0].updates == ("encoder", "discriminator")
    cast: Any = Judging(Zero())
    batch = images(*torch.randn(2, 4, 1))
    for step, role in ((9, "discriminator"), (10, "unconditional")):
        objective.discriminator_loss(cast, batch, Step(step))
        objective.student_loss(cast, batch, Step(step))
        assert set(cast.asked) == {role}
        cast.asked.clear()


def test_a_student_of_the_stage_before_leads_without_guidance() -> None:
    objective = Lightning(learn_from="student", discriminator_updates=3)
    assert objective.roles()["previous"] == Recorded(like="student")
    assert objective.inference() == InferenceSpec((999, 749, 499, 249), "deterministic")
    assert [phase.repeats for phase in objective.phases(0)] == [3, 1]
    for options in ({"guidance": 2.0, "learn_from": "student"}, {"teacher_steps": 0}, {"conditional_steps": -1}):
        with pytest.raises(UserError):
            Lightning(**options)


# ---- in the real trainer -------------------------------------------------------------------------------------------


def game(folder: str, objective: Any, lora: Any = None, **options: Any) -> Trainer:
    trainer = trainer_of(load_family(folder), objective, lora=lora, **options)
    trainer.batches.latents = PaintedLatents()
    return trainer


@pytest.mark.parametrize(
    ("family", "options", "lora"),
    [
        ("sd_folder", {"guidance": 2.0, "conditional_steps": 1}, {}),
        ("sd_folder", {"learn_from": "student", "layers": ("down_blocks.0", "mid_block")}, {"student": LORA}),
        ("sd3_folder", {"noised_at": (10, 750), "conditional_steps": 1}, {}),
    ],
    ids=["full", "lora, two layers", "flow"],
)
def test_a_turn_leaves_gradients_and_changes_on_its_own_roles_only(
    family: str, options: dict[str, Any], lora: Any, request: pytest.FixtureRequest
) -> None:
    trainer = game(request.getfixturevalue(family), Lightning((999, 499), **options), lora)
    for step in (0, 1):
        trainer.step = step
        for phase in trainer.objective.phases(step):
            before = weights_of(trainer)
            values = trainer._run_phase(phase, 0)
            after = weights_of(trainer)
            moved = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
            assert moved == set(phase.updates), (step, phase.name)
            assert all(values[f"{role}/gradient_norm"] > 0 for role in phase.updates)
            assert all(p.grad is None for p in trainer.cast.family.network().parameters())


def test_only_the_first_half_of_the_encoder_is_trained(sd_folder: str) -> None:
    trainer = game(sd_folder, Lightning())
    before = weights_of(trainer)
    trainer._run_phase(trainer.objective.phases(0)[0], 0)
    moved = {name for name, value in weights_of(trainer).items() if not torch.equal(before[name], value)}
    parts = {name.split("/")[1].partition(".")[0] for name in moved if name.startswith("encoder/")}
    assert {"conv_in", "down_blocks", "mid_block"} <= parts
    assert "up_blocks" not in parts


def test_over_a_few_turns_on_one_batch_each_player_lowers_its_own_loss(sd_folder: str) -> None:
    trainer = game(sd_folder, Lightning((999, 499)), player={"options": {"lr": 1e-2}})
    batch = trainer.batches.next("images", 2)
    trainer.batches.next = lambda stream, count, groups: batch  # type: ignore[method-assign]
    critic, student = trainer.objective.phases(0)
    for phase, name in ((critic, "discriminator"), (student, "adversarial")):
        losses = []
        for _ in range(6):
            torch.manual_seed(0)
            losses.append(trainer._run_phase(phase, 0)[name])
        assert losses[-1] < losses[0]


def test_progressive_hands_its_student_over(sd_folder: str) -> None:
    """The stage after a progressive one begins with its student on both sides."""
    first = game(sd_folder, Progressive(), steps=1)
    first.run()
    start = first.cast.state("student")
    cast = Cast(load_family(sd_folder), Lightning(learn_from="student").roles(), starts={"student": start})
    for role in ("student", "previous"):
        assert all(torch.equal(value, start.tensors[name]) for name, value in cast.state(role).tensors.items())
