"""Discriminators: the games' losses against closed forms, heads of every size, the adversarial terms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.discriminator import (
    Discriminator,
    MapHead,
    TokenHead,
    discriminator_loss,
    generator_loss,
    groups,
)
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import Batch
from stepdistill.schedule import VPSchedule


GAMES = ("non_saturating", "hinge", "least_squares", "relativistic")
REAL, FAKE = (2.0, -1.0, 0.25), (0.5, -3.0, 1.5)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logits(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].requires_grad_(True)


# ---- games ---------------------------------------------------------------------------------------------------------

# per game: what the discriminator pays for one real and one generated logit, and what the generator pays
PRICES: dict[str, Any] = {
    "non_saturating": lambda r, f: (softplus(-r) + softplus(f), softplus(-f)),
    "hinge": lambda r, f: (max(0.0, 1 - r) + max(0.0, 1 + f), -f),
    "least_squares": lambda r, f: (0.5 * (r - 1) ** 2 + 0.5 * (f + 1) ** 2, 0.5 * (f - 1) ** 2),
    "relativistic": lambda r, f: (softplus(f - r), softplus(r - f)),
}
# per game: derivatives of the discriminator's price by r and by f, and of the generator's by f
SLOPES: dict[str, Any] = {
    "non_saturating": lambda r, f: (-sigmoid(-r), sigmoid(f), -sigmoid(-f)),
    "hinge": lambda r, f: (-float(r < 1), float(f > -1), -1.0),
    "least_squares": lambda r, f: (r - 1, f + 1, f - 1),
    "relativistic": lambda r, f: (-sigmoid(f - r), sigmoid(f - r), -sigmoid(r - f)),
}


@pytest.mark.parametrize("game", GAMES)
def test_every_game_has_the_values_of_its_formulas(game: Any) -> None:
    real, fake = logits(REAL), logits(FAKE)
    prices = [PRICES[game](r, f) for r, f in zip(REAL, FAKE, strict=True)]
    assert discriminator_loss(real, fake, game).item() == pytest.approx(sum(p[0] for p in prices) / 3, abs=1e-12)
    assert generator_loss(fake, game, real).item() == pytest.approx(sum(p[1] for p in prices) / 3, abs=1e-12)


@pytest.mark.parametrize("game", GAMES)
def test_every_game_has_the_gradients_of_its_formulas(game: Any) -> None:
    real, fake = logits(REAL), logits(FAKE)
    slopes = torch.tensor([SLOPES[game](r, f) for r, f in zip(REAL, FAKE, strict=True)], dtype=torch.float64) / 3
    by_real, by_fake = torch.autograd.grad(discriminator_loss(real, fake, game), (real, fake))
    torch.testing.assert_close(by_real[:, 0], slopes[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(by_fake[:, 0], slopes[:, 1], rtol=0, atol=1e-12)
    (by_fake,) = torch.autograd.grad(generator_loss(fake, game, real), fake)
    torch.testing.assert_close(by_fake[:, 0], slopes[:, 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("game", GAMES)
def test_descending_parts_the_logits_and_the_generator_pulls_its_own_up(game: Any) -> None:
    real, fake = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    by_real, by_fake = torch.autograd.grad(discriminator_loss(real, fake, game), (real, fake))
    assert (by_real < 0).all()
    assert (by_fake > 0).all()
    (by_fake,) = torch.autograd.grad(generator_loss(fake, game, real), fake)
    assert (by_fake < 0).all()


@pytest.mark.parametrize(("game", "best"), [("non_saturating", math.log(3)), ("least_squares", 0.5)])
def test_the_best_logit_is_a_function_of_the_density_ratio(game: Any, best: float) -> None:
    """Real samples are at the first place thrice as often, generated ones at the second: log p/q and (p-q)/(p+q)."""
    places = torch.tensor([best, -best], dtype=torch.float64, requires_grad=True)
    loss = discriminator_loss(places[[0, 0, 0, 1]][:, None], places[[0, 1, 1, 1]][:, None], game)
    (gradient,) = torch.autograd.grad(loss, places)
    assert gradient.abs().max() < 1e-12
    off = places.detach() + torch.tensor([0.1, 0.0], dtype=torch.float64)
    assert discriminator_loss(off[[0, 0, 0, 1]][:, None], off[[0, 1, 1, 1]][:, None], game) > loss


def test_the_relativistic_game_looks_at_differences_within_a_row_only() -> None:
    real, fake = logits(REAL), logits(FAKE)
    shift = torch.tensor([[5.0], [-2.0], [0.5]], dtype=torch.float64)
    for loss in (
        lambda r, f: discriminator_loss(r, f, "relativistic"),
        lambda r, f: generator_loss(f, "relativistic", r),
    ):
        assert loss(real + shift, fake + shift).item() == pytest.approx(loss(real, fake).item(), abs=1e-12)
    with pytest.raises(ValueError, match="real samples"):
        generator_loss(fake, "relativistic")


# ---- heads ---------------------------------------------------------------------------------------------------------


def convolutions(head: MapHead) -> list[tuple[int, int, int]]:
    """(kernel, stride, padding) of the convolutions in their order."""
    return [(m.kernel_size[0], m.stride[0], int(m.padding[0])) for m in head.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(("side", "halvings"), [(4, 0), (8, 1), (32, 3)])
def test_a_map_is_halved_until_four_by_four_are_left(side: int, halvings: int) -> None:
    torch.manual_seed(0)
    head = MapHead(16, side)
    # DMD2's heads: 4x4 stride 2 padding 1, then 4x4 over what is left, then 1x1
    assert convolutions(head) == [(4, 2, 1)] * halvings + [(4, 1, 0), (1, 1, 0)]
    feature = torch.randn(3, 16, side, side, requires_grad=True)
    logit = head(feature)
    assert logit.shape == (3, 1)
    (gradient,) = torch.autograd.grad(logit[1].sum(), feature)
    assert (gradient[1].abs().amax(0) > 1e-12).all(), "every place of the map is looked at"
    assert gradient[[0, 2]].abs().max() == 0, "a sample's logit depends on the sample alone"


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 9])
def test_maps_of_any_side_get_a_logit(side: int) -> None:
    torch.manual_seed(0)
    feature = torch.randn(2, 16, side, side)
    logit = MapHead(16, side)(feature)
    assert logit.shape == (2, 1)
    assert (logit[0] - logit[1]).abs() > 1e-6


def test_a_larger_map_than_the_head_was_built_for_is_looked_at_in_all_places() -> None:
    torch.manual_seed(0)
    feature = torch.randn(2, 16, 6, 9, requires_grad=True)
    logit = MapHead(16, 4)(feature)
    assert logit.shape == (2, 1)
    (gradient,) = torch.autograd.grad(logit.sum(), feature)
    assert (gradient.abs().amax((0, 1)) > 1e-12).all()


@pytest.mark.parametrize("channels", [3, 8, 16, 32, 48, 64])
def test_few_channels_leave_the_logit_something_to_see(channels: int) -> None:
    """A group of one channel, normalised at the one place that is left, would be 0 for every input."""
    torch.manual_seed(1)
    head = MapHead(channels, 4)
    told = head(torch.randn(8, channels, 4, 4))
    assert told.std() > 1e-3


@pytest.mark.parametrize("channels", [128, 320, 768, 1280])
def test_wide_maps_are_normalised_in_the_published_thirty_two_groups(channels: int) -> None:
    assert groups(channels) == 32


@pytest.mark.parametrize("channels", range(1, 200))
def test_groups_divide_the_channels(channels: int) -> None:
    count = groups(channels)
    assert channels % count == 0
    assert count == 1 or channels // count >= 4


@pytest.mark.parametrize("tokens", [1, 5, 256])
def test_tokens_are_judged_together_in_any_order(tokens: int) -> None:
    torch.manual_seed(2)
    head, feature = TokenHead(12), torch.randn(3, tokens, 12, requires_grad=True)
    logit = head(feature)
    assert logit.shape == (3, 1)
    torch.testing.assert_close(head(feature.flip(1)), logit)
    assert logit.std() > 1e-3
    (slope,) = torch.autograd.grad(logit.sum(), feature)
    assert torch.isfinite(slope).all() and slope.abs().amax(-1).min() > 0


def test_a_head_on_tokens_tells_samples_whose_every_token_is_as_likely() -> None:
    # Real samples have tokens of both kinds, made ones those of one kind: no token alone says which it is.
    torch.manual_seed(2)

    def samples(mixed: bool) -> Tensor:
        kind = torch.randint(2, (64, 16 if mixed else 1, 1)).expand(64, 16, 1)
        return (2.0 * kind - 1) * torch.tensor([1.0, -1.0]).repeat(4) + 0.1 * torch.randn(64, 16, 8)

    head = TokenHead(8)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        discriminator_loss(head(samples(True)), head(samples(False)), "hinge").backward()
        optimizer.step()
    with torch.no_grad():
        assert discriminator_loss(head(samples(True)), head(samples(False)), "hinge") < 0.2, "a coin has 2"


def test_a_discriminator_gives_a_logit_per_feature() -> None:
    torch.manual_seed(3)
    network = Discriminator([(16, 8, 8), (24, 4, 6), (10, 12)])
    features = [torch.randn(2, 16, 8, 8), torch.randn(2, 24, 4, 6), torch.randn(2, 10, 12)]
    told = network(features)
    assert told.shape == (2, 3)
    for index, head in enumerate(network.heads):
        torch.testing.assert_close(told[:, index : index + 1], head(features[index]))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        network(features[:2])


# ---- the game between student and discriminator --------------------------------------------------------------------

SCHEDULE = VPSchedule(torch.linspace(0.99, 0.01, 50, dtype=torch.float64))


class LinearHead:
    """The logit w . x_t; remembers what it was shown."""

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, denoiser: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.shown.append((x_t.detach(), t))
        return (self.w * x_t).flatten(1).sum(1, keepdim=True)


class Table:
    """Stands in for a cast: one head on any denoiser."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.linear = LinearHead(0.3 * torch.randn(2, 2, 2, dtype=torch.float64))
        self.asked: list[str] = []

    def denoiser(self, role: str, *, renamed: bool = True) -> Any:
        self.asked.append(role)
        return SimpleNamespace(schedule=SCHEDULE)

    def head(self, role: str) -> LinearHead:
        assert role == "discriminator"
        return self.linear


def batch_of(count: int) -> Batch:
    rows = Condition({"label": torch.zeros(count)})
    latents = torch.randn(count, 2, 2, 2, dtype=torch.float64)
    return Batch(rows, rows, (2, 2, 2), torch.device("cpu"), latents)


def alpha_of(t: Tensor) -> Tensor:
    return SCHEDULE.alpha(t)[:, None, None, None]


@pytest.mark.parametrize("game", GAMES)
def test_the_discriminators_terms_are_the_games_loss_of_noised_samples(game: Any) -> None:
    table: Any = Table()
    batch, x0 = batch_of(6), torch.randn(6, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    terms = Adversary(game=game, features="teacher").discriminator_terms(table, x0, batch)
    assert set(terms) == {"discriminator"}
    assert set(table.asked) == {"teacher"}
    (real, real_t), (fake, fake_t) = table.linear.shown
    judged = [(table.linear.w * x).flatten(1).sum(1, keepdim=True) for x in (real, fake)]
    torch.testing.assert_close(terms["discriminator"], discriminator_loss(*judged, game))
    assert not torch.equal(real_t, fake_t), "times are drawn for both kinds on their own"
    assert not terms["discriminator"].requires_grad, "the student's samples are detached"
    for x_t, clean, t in ((real, batch.latents, real_t), (fake, x0.detach(), fake_t)):
        noise = (x_t - alpha_of(t) * clean) / SCHEDULE.sigma(t)[:, None, None, None]
        assert noise.abs().max() < 5
        assert noise.std() == pytest.approx(1.0, abs=0.4)


def test_approximate_r1_moves_the_real_sample_alone_and_leaves_time_and_noise() -> None:
    table: Any = Table()
    batch = batch_of(4000)
    game = Adversary(r1_weight=100.0, r1_std=0.1)
    terms = game.discriminator_terms(table, torch.zeros_like(batch.latents), batch)
    (real, real_t), _, (moved, moved_t) = table.linear.shown
    assert torch.equal(real_t, moved_t)
    shift = (moved - real) / alpha_of(
        real_t
    )  # noise and time are the same, so this is what was added to the clean one
    assert shift.std() == pytest.approx(0.1, rel=0.02)
    difference = (table.linear.w * (moved - real)).flatten(1).sum(1)
    assert terms["r1"].item() == pytest.approx(100 * difference.square().mean().item(), rel=1e-9)
    # |D(x + s n) - D(x)|^2 = s^2 alpha^2 (w . n)^2, whose mean over n is s^2 alpha^2 |w|^2
    expected = 100 * 0.1**2 * (alpha_of(real_t) ** 2).mean() * table.linear.w.square().sum()
    assert terms["r1"].item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("game", GAMES)
def test_the_students_term_has_the_gradient_of_the_whole_graph(game: Any) -> None:
    table: Any = Table()
    batch = batch_of(5)
    x0 = torch.randn(5, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():  # an objective may be asked for its value only: the gradient is taken all the same
        Adversary(game=game).student_term(table, x0, batch)
    table.linear.shown.clear()
    term = Adversary(game=game).student_term(table, x0, batch)
    (gradient,) = torch.autograd.grad(term, x0)
    t = table.linear.shown[0][1]
    judged = [(table.linear.w * x).flatten(1).sum(1, keepdim=True) for x, _ in table.linear.shown]
    fake = judged[0].requires_grad_(True)
    loss = generator_loss(fake, game, judged[-1] if game == "relativistic" else None)
    (by_logit,) = torch.autograd.grad(loss, fake)
    assert len(judged) == (2 if game == "relativistic" else 1)
    assert term.item() == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(gradient, by_logit[:, :, None, None] * alpha_of(t) * table.linear.w)


def test_only_the_relativistic_game_needs_images_in_the_students_turn() -> None:
    assert [game for game in GAMES if Adversary(game=game).student_needs_images] == ["relativistic"]  # type: ignore[arg-type]
