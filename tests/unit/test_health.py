"""Measures are what their names say, a collapse is told from a beginning, and looking changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import stepdistill.previews
from stepdistill.condition import Condition
from stepdistill.console import Display, health_line
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.health import (
    HealthSettings,
    Monitor,
    allowed,
    contrast,
    denoising_error,
    diversity,
    drift,
    find_doubts,
    improve,
    make_probe,
    saturation,
)
from stepdistill.objectives import OBJECTIVES
from stepdistill.objectives.base import Head, InferenceSpec, Role, critic_scale_of
from stepdistill.objectives.denoising import Denoising
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.options import build_named
from stepdistill.prediction import add_noise
from stepdistill.previews import Previews
from stepdistill.recipe import Recipe
from stepdistill.recipe_sections import HealthConfig
from stepdistill.schedule import VPSchedule
from stepdistill.trainer import Progress, TrainerSettings
from tests.oracles.oracle import Linear, Roles, gaussian, label, linear_student
from tests.tiny import LORA, PROMPTS, Copying, trainer_of, weights_of


BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SCHEDULE = VPSchedule(torch.cumprod(1 - BETAS, 0))
SHAPE = (3, 8, 8)
M, S = 0.2, 0.5  # mean and standard deviation of the analytic teacher's latents
SMALL = HealthSettings(prompts=2, samples=2, teacher_steps=4)
HEALTHY = {"mean": 0.0, "saturation": 0.0, "contrast": 1.0, "diversity": 1.0, "scale": 1.0, "critic_ratio": 1.0}


class Latents:
    """Stands in for a family: latents are pictures already, a prompt is a number."""

    device = torch.device("cpu")

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        return SHAPE

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return Condition({"label": torch.full((len(prompts),), M)})

    def null_condition(self, count: int) -> Condition:
        return Condition({"label": torch.full((count,), -M)})

    def decode_latents(self, latents: Tensor) -> Tensor:
        return (latents / 8 + 0.5).clamp(0, 1)


def monitor_of(
    a: float = S, b: float = M, critic: tuple[float, float] | None = None, settings: HealthSettings = SMALL,
    **options: Any,
) -> tuple[Monitor, Linear]:  # fmt: skip
    """A student a z + b beside a teacher N(M, S^2) and a critic that knows N(*critic), by default the student."""
    network = Linear(a, b)
    mean, std = critic or (b, max(abs(a), 1e-3))
    roles = Roles({
        "teacher": gaussian(label, S, SCHEDULE),
        "student": linear_student(network, SCHEDULE),
        "critic": gaussian(lambda c: torch.full((len(c),), mean), std, SCHEDULE),
    })  # fmt: skip
    family: Any = Latents()
    probe = make_probe(family, ["a", "b", "c"], samples=settings.samples, seed=settings.seed)
    spec = options.pop("spec", InferenceSpec((999,)))
    cast: Any = roles
    monitor = Monitor(cast, family, probe, spec, settings, **{"guidance": 1.0, **options})
    monitor.begin()
    return monitor, network


# ---- measures ------------------------------------------------------------------------------------------------------


def test_a_plain_area_has_no_contrast_and_halves_of_black_and_white_have_one_half() -> None:
    plain, halves = torch.full((1, 3, 4, 4), 0.3), torch.zeros(1, 3, 4, 4)
    halves[..., :2] = 1
    assert contrast(plain).item() == pytest.approx(0.0, abs=1e-7)
    assert contrast(torch.cat([plain, halves])).item() == pytest.approx(0.25)


def test_grey_has_no_saturation_and_a_pure_colour_has_one() -> None:
    grey, red = torch.full((1, 3, 2, 2), 0.7), torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    assert saturation(grey).item() == 0
    assert saturation(torch.cat([grey, red])).item() == pytest.approx(0.5)


def test_diversity_is_the_distance_within_a_prompt_and_ignores_the_distance_between_prompts() -> None:
    first, second = torch.zeros(3, 3, 4, 4), torch.full((3, 3, 4, 4), 0.9)
    assert diversity(torch.cat([first, second]), 3).item() == 0
    second[0] += 0.1  # three pairs, two of them 0.1 apart
    assert diversity(torch.cat([first, second]), 3).item() == pytest.approx(0.5 * 0.2 / 3, rel=1e-5)


def test_the_error_of_a_denoiser_that_is_right_is_zero_and_of_one_that_says_nothing_is_the_target() -> None:
    x0, eps = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    t = SCHEDULE.t_from_model_time(torch.tensor([20, 300, 700, 980], dtype=torch.float64))
    empty = Condition({"label": torch.zeros(4)})

    def said(native: Tensor) -> Any:
        denoiser = gaussian(label, S, SCHEDULE)
        denoiser._call = lambda *_: native
        return denoiser(add_noise(SCHEDULE, x0, t, eps), t, empty)

    assert denoising_error(said(eps), x0, eps).max() < 1e-6
    # with d = x0 said - x0, v said - v = -d / sigma, and an error e in eps is d = -e sigma / alpha
    alpha = SCHEDULE.alpha(t)
    wrong = denoising_error(said(eps + 0.1), x0, eps).double()
    torch.testing.assert_close(wrong, (0.1 / alpha) ** 2, rtol=1e-3, atol=1e-6)


def test_drift_is_a_difference_of_levels_and_a_ratio_of_spreads() -> None:
    own = {"mean": 0.6, "saturation": 0.1, "contrast": 0.1, "diversity": 0.3, "scale": 2.0}
    teacher = {"mean": 0.5, "saturation": 0.4, "contrast": 0.2, "diversity": 0.0, "scale": 1.0}
    found = drift(own, teacher)
    assert found["mean"] == pytest.approx(0.1)
    assert found["saturation"] == pytest.approx(-0.3)
    assert (found["contrast"], found["scale"]) == (0.5, 2.0)
    assert math.isfinite(found["diversity"])


# ---- judgement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"contrast": 0.04}, "contrast 0.04 is below 0.05"),
        ({"diversity": 0.01}, "diversity 0.01 is below 0.02"),
        ({"scale": 10.1}, "scale 10.1 is above 10"),
        ({"critic_ratio": 4.5}, "critic_ratio 4.5 is above 4"),
        ({"mean": -0.31}, "mean -0.31 is below -0.3"),
        ({"saturation": 0.4}, "saturation 0.4 is above 0.3"),
        ({"direction": math.nan}, "direction is not finite"),
        ({"scale": math.inf}, "scale is not finite"),
    ],
)
def test_every_limit_finds_what_is_beyond_it_and_names_the_measure(change: dict[str, float], text: str) -> None:
    best = improve({}, HEALTHY)
    assert find_doubts(HEALTHY, best, HealthSettings()) == ()
    assert find_doubts({**HEALTHY, **change}, best, HealthSettings()) == (text,)


@pytest.mark.parametrize("limit", [f.name for f in dataclasses.fields(HealthSettings) if f.name[:3] in ("min", "max")])
def test_a_limit_that_is_null_is_no_limit(limit: str) -> None:
    bad = {"mean": 0.9, "saturation": 0.9, "contrast": 0.0, "diversity": 0.0, "scale": 99.0, "critic_ratio": 99.0}
    measure = {"max_drift": "mean"}.get(limit, limit[4:])
    best = improve({}, HEALTHY)
    assert measure in " ".join(find_doubts(bad, best, HealthSettings()))
    without = dataclasses.replace(HealthSettings(), **{limit: None})
    assert f"{measure} " not in " ".join(find_doubts(bad, best, without))


def test_limits_start_from_where_the_student_starts_and_never_ask_more_than_the_teacher() -> None:
    vague = {**HEALTHY, "contrast": 0.1, "diversity": 0.01, "scale": 9.0, "mean": -0.5, "critic_ratio": 0.5}
    best = improve({}, vague)
    assert find_doubts(vague, best, HealthSettings()) == ()
    bounds = allowed(HealthSettings(), best)
    assert bounds["contrast"][0] == pytest.approx(0.05 * 0.1)
    assert bounds["scale"][1] == pytest.approx(90.0)
    assert bounds["mean"] == pytest.approx((-0.8, 0.8))
    assert bounds["critic_ratio"][1] == 4.0
    best = improve(best, {**HEALTHY, "contrast": 3.0, "scale": math.nan})
    bounds = allowed(HealthSettings(), best)
    assert bounds["contrast"][0] == pytest.approx(0.05), "three times the teacher's contrast is no standard"
    assert bounds["scale"][1] == pytest.approx(90.0), "what is not finite is not the best"
    assert bounds["mean"] == pytest.approx((-0.3, 0.3))


# ---- the monitor on an analytic teacher ----------------------------------------------------------------------------


def test_a_student_with_its_teachers_distribution_measures_as_its_teacher() -> None:
    monitor, _ = monitor_of(settings=dataclasses.replace(SMALL, teacher_steps=100))
    found = monitor.measure()
    assert found["mean"] == pytest.approx(0.0, abs=0.01)
    assert found["contrast"] == pytest.approx(1.0, abs=0.05)
    assert found["diversity"] == pytest.approx(1.0, abs=0.05)
    assert found["scale"] == pytest.approx(1.0, abs=0.05)
    assert found["critic_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert found["direction"] == pytest.approx(0.0, abs=1e-5)


def test_the_direction_has_the_size_of_the_difference_between_the_clean_predictions() -> None:
    """Two Gaussians of one width and means 0.3 apart predict x0 0.3 sigma^2 / v apart, at whatever x_t."""
    monitor, _ = monitor_of(critic=(M + 0.3, S))
    count = len(monitor.probe.noise)
    index = ((0.02 + 0.96 * (torch.arange(count) + 0.5) / count) * 1000).round().double()
    t = SCHEDULE.t_from_model_time(index)
    v = SCHEDULE.alpha(t) ** 2 * S**2 + SCHEDULE.sigma(t) ** 2
    gap = (0.3 * SCHEDULE.sigma(t) ** 2 / v).square().mean().sqrt().item()
    assert monitor.measure()["direction"] == pytest.approx(gap / monitor._teacher["scale"], rel=1e-4)


def test_the_direction_compares_with_the_guided_teacher_and_the_error_with_the_plain_one() -> None:
    plain, _ = monitor_of(guidance=1.0)
    guided, _ = monitor_of(guidance=3.0)
    one, other = plain.measure(), guided.measure()
    assert one["teacher_error"] == pytest.approx(other["teacher_error"], rel=1e-5)
    assert other["direction"] > one["direction"] + 0.05


def test_a_critic_that_knows_the_student_makes_smaller_errors_than_the_teacher_and_a_lost_one_larger() -> None:
    knowing, _ = monitor_of(a=0.1, b=-0.5)
    lost, _ = monitor_of(a=0.1, b=-0.5, critic=(3.0, 0.1))
    assert knowing.measure()["critic_ratio"] < 0.5
    assert lost.measure()["critic_ratio"] > 4


def test_a_critic_is_asked_at_the_guidance_at_which_it_learns() -> None:
    """SiD with Zero-CFG teaches its critic without prompts: with them it says what it has never learnt."""
    ratios = []
    for scale in (0.0, 1.0):
        monitor, _ = monitor_of(a=0.1, b=-0.5, critic_scale=scale)
        roles: Any = monitor.cast
        roles._denoisers["critic"] = gaussian(lambda c: torch.where(label(c) == -M, -0.5, 3.0), 0.1, SCHEDULE)
        ratios.append(monitor.measure()["critic_ratio"])
    assert ratios[0] < 0.5
    assert ratios[1] > 4


def test_every_wrapper_says_at_which_guidance_its_games_critic_learns() -> None:
    sid: dict[str, Any] = {"name": "sid", "guidance": 1.0, "critic_guidance": [0.0, 0.0, 0.0]}
    for config in (sid, {"name": "disback", "base": sid}, {"name": "sum", "parts": [{"objective": sid}]}):
        options = {key: value for key, value in config.items() if key != "name"}
        assert critic_scale_of(build_named(config["name"], options, "here")) == 0.0, config["name"]
    assert critic_scale_of(build_named("sid", {"guidance": 4.5}, "here")) == 4.5
    assert critic_scale_of(build_named("vsd", {"guidance": 4.5}, "here")) == 1.0


def test_a_student_that_becomes_constant_is_told_from_one_that_is_well() -> None:
    settings = dataclasses.replace(SMALL, grace=0, patience=2)
    monitor, student = monitor_of(settings=settings)
    monitor.examine(100)
    assert monitor.doubts == ()
    with torch.no_grad():
        student.a.zero_()
    monitor.examine(200)
    assert not monitor.has_collapsed(last=False)
    assert monitor.has_collapsed(last=True), "nothing comes after the last measurement"
    monitor.examine(300)
    assert monitor.has_collapsed(last=False)
    text = monitor.diagnosis()
    for part in ("collapsed: contrast 0 is below", "diversity 0 is below", "in 2 measurement(s)", "critic_ratio"):
        assert part in text
    with torch.no_grad():
        student.a.fill_(S)
    monitor.examine(400)
    assert monitor.strikes == 0, "a student that recovers is well"


def test_early_vagueness_is_excused_and_an_early_explosion_is_not() -> None:
    settings = dataclasses.replace(SMALL, grace=200, patience=1)
    monitor, student = monitor_of(settings=settings)
    with torch.no_grad():
        student.a.zero_()
        student.b.fill_(3.5)
    monitor.examine(200)
    assert not monitor.has_collapsed(last=False)
    monitor.examine(201)
    assert monitor.has_collapsed(last=False)
    assert [doubt.split()[0] for doubt in monitor.doubts] == ["mean", "contrast", "diversity"]
    exploding, student = monitor_of(settings=settings)
    with torch.no_grad():
        student.a.fill_(50 * S)
    exploding.examine(1)
    assert "scale" in " ".join(exploding.doubts)


def test_a_student_that_says_nan_is_in_doubt() -> None:
    monitor, student = monitor_of()
    with torch.no_grad():
        student.b.fill_(math.nan)
    monitor.examine(1)
    assert "scale is not finite" in monitor.doubts


def test_looking_draws_none_of_the_trainings_random_numbers_and_sees_the_same_twice() -> None:
    monitor, _ = monitor_of(spec=InferenceSpec((999, 499)))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = monitor.measure()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert monitor.measure() == first
    monitor._measure_teacher()
    make_probe(monitor.family, ["a"], samples=2, seed=0)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_number_of_rows_in_one_call_changes_nothing() -> None:
    whole, _ = monitor_of(rows=8)
    parts, _ = monitor_of(rows=4)
    one, other = whole.measure(), parts.measure()
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_what_a_run_has_shown_survives_a_resume() -> None:
    monitor, _ = monitor_of()
    monitor.best["diversity"] = 0.77
    other, _ = monitor_of()
    other.load_state(monitor.state())
    other.begin()
    assert other.best == monitor.best


# ---- the monitor in a game -----------------------------------------------------------------------------------------


class HeadByThatName(Copying):
    def roles(self) -> Mapping[str, Role]:
        return {**super().roles(), "critic": Head(lambda shapes: nn.Linear(1, 1))}


def test_the_roles_of_the_objective_say_what_can_be_measured(sd: ModelFamily) -> None:
    image = {"mean", "saturation", "contrast", "diversity", "scale"}
    both = {"critic_error", "teacher_error", "critic_ratio", "direction"}
    for objective, names in ((DMD2(critic_updates=1), image | both), (Copying(), image)):
        trainer = trainer_of(sd, objective, lora={"student": LORA})
        monitor = Monitor.of(trainer.cast, objective, PROMPTS, SMALL)
        assert monitor is not None
        monitor.begin()
        assert monitor.examine(1).keys() == names
        trainer.cast.release()
    cast: Any = trainer.cast
    head = Monitor.of(cast, HeadByThatName(), PROMPTS, SMALL)
    assert head is not None
    assert not head.has_critic
    assert Monitor.of(cast, Denoising(), PROMPTS, SMALL) is None, "no teacher, no few steps: nothing to compare"


def test_no_method_is_named_in_the_monitor() -> None:
    text = (Path(stepdistill.previews.__file__).parent / "health.py").read_text()
    assert "stepdistill.objectives.base" in text
    assert text.count("stepdistill.objectives") == 1
    assert [name for name in OBJECTIVES if f'"{name}"' in text] == []


def test_a_measurement_costs_less_than_a_hundredth_of_the_iterations_between_two(sd: ModelFamily) -> None:
    """Counted in samples through a network, forward only; the trained passes' backward makes it cheaper yet."""
    rows = [0]
    objective = DMD2(critic_updates=1)
    trainer = trainer_of(sd, objective, batch_size=8)
    monitor = Monitor.of(trainer.cast, objective, PROMPTS, HealthSettings())
    assert monitor is not None
    monitor.begin()
    for role in objective.roles():
        network = trainer.cast.denoiser(role).weights.network
        network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    monitor.measure()
    measuring = sum(rows)
    rows.clear()
    trainer._iterate()
    assert measuring > 0
    assert measuring < 0.01 * monitor.settings.every * sum(rows)


# ---- what is shown -------------------------------------------------------------------------------------------------

MEASURES = {"mean": 0.02, "saturation": -0.1, "contrast": 0.951, "diversity": 0.88, "scale": 1.0,
            "critic_error": 0.1, "teacher_error": 0.2, "critic_ratio": 0.5, "direction": 0.314}  # fmt: skip


def progress(**changes: Any) -> Progress:
    return Progress(0, 50, 100, {"matching": 0.25, "health/contrast": 0.951}, 10.0, 61.0, **changes)


def test_the_progress_line_shows_the_measures_and_a_doubt() -> None:
    line = health_line(MEASURES, ("diversity 0.001 is below 0.02",))
    assert line == ("critic/teacher 0.50 direction 0.31 mean +0.02 contrast 0.95 saturation -0.10 diversity 0.88"
                    " | DOUBT: diversity 0.001 is below 0.02")  # fmt: skip
    assert health_line({}, ()) == ""
    stream = io.StringIO()
    Display(Console(file=stream, width=300)).step(progress(health=MEASURES))
    assert "matching 0.2500 | 10.0 img/s | 1:01 left | critic/teacher 0.50" in stream.getvalue()


def test_on_a_narrow_terminal_nothing_of_it_is_cut_off() -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=80, force_terminal=True, color_system=None))
    with display.training("stage 1: dmd2"):
        display.step(progress(health=MEASURES, doubts=("diversity 0.001 is below 0.02",)))
    words = stream.getvalue().replace("\x1b", " ").split()
    for part in ("matching", "50/100", "critic/teacher", "diversity", "0.88", "DOUBT:", "0.02"):
        assert part in words, part


def test_on_a_terminal_health_has_a_line_of_its_own() -> None:
    display = Display(Console(file=io.StringIO(), width=200, force_terminal=True))
    with display.training("stage 1"):
        display.step(progress())
        assert display._bar is not None
        assert "\n" not in display._bar.tasks[0].fields["news"]
        display.step(progress(health=MEASURES, doubts=("x",)))
        news = display._bar.tasks[0].fields["news"].splitlines()
    assert len(news) == 2
    assert news[1].startswith("critic/teacher 0.50")
    assert news[1].endswith("DOUBT: x")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The rows of every grid that is drawn."""
    seen: list[dict[str, Tensor]] = []
    draw = stepdistill.previews.labelled_grid

    def remember(rows: dict[str, Tensor], captions: Sequence[str], cell: int = 128) -> Any:
        seen.append(rows)
        return draw(rows, captions, cell)

    monkeypatch.setattr(stepdistill.previews, "labelled_grid", remember)
    return seen


def test_a_preview_for_which_there_is_no_room_is_a_warning_and_the_run_goes_on(
    sd: ModelFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    previews = Previews(sd, ("a",), InferenceSpec((999,)), tmp_path, teacher_steps=2, guidance=1.0)
    student = trainer_of(sd, DMD2(critic_updates=1)).cast.denoiser("student")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", full)
        with pytest.warns(RuntimeWarning, match=r"step-0000001\.png could not be written \(No space left on device\)"):
            assert previews.write(student, None, 1) is None
    assert list(tmp_path.iterdir()) == []
    assert previews.write(student, None, 2) == tmp_path / "step-0000002.png"
    assert [file.name for file in tmp_path.iterdir()] == ["step-0000002.png"]


def test_previews_show_triptychs_where_there_are_teacher_and_critic(
    sd: ModelFamily, tmp_path: Path, shown: list[dict[str, Tensor]]
) -> None:
    trainer = trainer_of(sd, DMD2(critic_updates=1))
    cast = trainer.cast
    previews = Previews(sd, ("a", "b"), InferenceSpec((999,)), tmp_path, teacher_steps=2, guidance=1.0)
    student, teacher, critic = (cast.denoiser(role) for role in ("student", "teacher", "critic"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    previews.write(student, teacher, 1, critic=critic)
    assert torch.equal(torch.get_rng_state(), before), "pictures must not change what is trained afterwards"
    assert list(shown[0]) == ["teacher", "student", "teacher's x0", "critic's x0"]
    torch.testing.assert_close(shown[0]["teacher's x0"], shown[0]["critic's x0"])  # the critic starts as the teacher
    assert not torch.allclose(shown[0]["student"], shown[0]["critic's x0"], atol=1e-3)
    with torch.no_grad():
        cast.parameters("critic")["conv_out.bias"].add_(1.0)
    previews.write(student, teacher, 2, critic=critic)
    assert torch.equal(shown[1]["teacher's x0"], shown[0]["teacher's x0"])
    assert not torch.allclose(shown[1]["critic's x0"], shown[0]["critic's x0"], atol=1e-3)
    previews.write(student, teacher, 3)
    assert list(shown[2]) == ["teacher", "student"]
    assert torch.equal(shown[2]["student"], shown[0]["student"])
    assert (tmp_path / "step-0000003.png").is_file()


def test_previews_take_no_more_samples_at_once_than_training_and_decode_one_image_in_full_precision(
    sd: ModelFamily, tmp_path: Path, shown: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = trainer_of(sd, DMD2(critic_updates=1)).cast
    views = [cast.denoiser(role) for role in ("student", "teacher", "critic")]
    decoded, called = [], []
    decode, forward = sd.decode_latents, sd.network().forward

    def decoding(latents: Tensor) -> Tensor:
        decoded.append((len(latents), torch.is_autocast_enabled("cpu")))
        return decode(latents)

    def calling(x_t: Tensor, *args: Any, **options: Any) -> Any:
        called.append(len(x_t))
        return forward(x_t, *args, **options)

    options: dict[str, Any] = {"teacher_steps": 2, "guidance": 1.0}
    whole = Previews(sd, ("a", "b", "c"), InferenceSpec((999,)), tmp_path, **options)
    whole.write(*views[:2], 1, critic=views[2])
    monkeypatch.setattr(sd, "decode_latents", decoding)
    monkeypatch.setattr(sd.network(), "forward", calling)
    parts = Previews(sd, ("a", "b", "c"), InferenceSpec((999,)), tmp_path, rows=2, **options)
    parts.write(*views[:2], 2, critic=views[2])
    assert called and max(called) == 2
    assert decoded == [(1, False)] * 12
    for name, images in shown[0].items():
        torch.testing.assert_close(shown[1][name], images, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        parts.write(*views[:2], 3, critic=views[2])
    assert set(decoded) == {(1, False)}


# ---- in a recipe ---------------------------------------------------------------------------------------------------


def test_a_recipe_watches_by_default_with_the_settings_own_defaults_and_null_watches_nothing() -> None:
    by_default = Recipe.load("quickstart").health
    assert by_default == HealthConfig()
    options = by_default.model_dump()
    assert options.pop("skips") == TrainerSettings(steps=1, batch_size=1).skips
    assert HealthSettings(**options) == HealthSettings()
    assert Recipe.load("quickstart", ["health=null"]).health is None


def test_who_watches_does_not_make_another_recipe() -> None:
    base = Recipe.load("quickstart")
    for change in ("health=null", "health.max_scale=9", "health.skips=0"):
        assert Recipe.load("quickstart", [change]).sha256 == base.sha256
    with pytest.raises(UserError, match=r"health\.min_contrasts: unknown key; did you mean 'min_contrast'"):
        Recipe.load("quickstart", ["health.min_contrasts=0.1"])


def test_weights_are_the_same_with_and_without_a_monitor(sd_folder: str) -> None:
    from stepdistill.families import load_family

    ends = []
    for watched in (False, True):
        objective = DMD2(critic_updates=1, timesteps=(999, 499))
        trainer = trainer_of(load_family(sd_folder), objective, lora={"student": LORA}, steps=3)
        if watched:
            trainer.monitor = Monitor.of(trainer.cast, objective, PROMPTS, dataclasses.replace(SMALL, every=1))
        trainer.run()
        ends.append(weights_of(trainer))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
