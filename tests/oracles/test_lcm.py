"""Latent consistency on Gaussians, and on a real network against an implementation from the formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives import lcm
from stepdistill.objectives.base import Frozen, InferenceSpec, Recorded, Step, Trained
from stepdistill.objectives.lcm import LCM
from stepdistill.prediction import Levels, native_target
from stepdistill.schedule import NoiseSchedule
from stepdistill.segments import SolverGrid
from tests.families.test_export import BETAS
from tests.oracles.oracle import GivenNoise, Roles, constant, four_signs, gaussian, label
from tests.oracles.trajectories import FLOW, STD, VP, images, point, slope
from tests.tiny import LORA, scramble


CPU = torch.device("cpu")
STEPS = 5
FIFTY = [20 * i - 1 for i in range(1, 51)]  # the timesteps of LCM's grid
KINDS = [(VP, "epsilon"), (VP, "v_prediction"), (VP, "sample"), (FLOW, "flow")]
PLAIN: dict[str, Any] = {"guidance": 1.0, "embed_guidance": False, "distance": "mse", "target_decay": 0.0}


class Multiples(nn.Module):
    """x0 = a_i x at the i-th time of the solver's grid."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(steps + 1, dtype=torch.float64))


def multiplying(network: Multiples, schedule: NoiseSchedule = VP, kind: str = "epsilon") -> Denoiser:
    """The view of multiples as a network of a kind; at time 0, where it is not to be asked, it says NaN."""

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = schedule.t_from_model_time(model_time)
        levels = Levels.at(schedule, t, x_t)
        i = (t * (len(module.a) - 1)).round().long()
        x0 = torch.where(i == 0, torch.nan, module.a[i]).reshape((-1,) + (1,) * (x_t.ndim - 1)) * x_t
        return native_target(kind, x0, (x_t - levels.alpha * x0) / levels.sigma, levels)

    denoiser = Denoiser(call, OwnWeights(network), schedule, kind)
    network.requires_grad_(True)
    return denoiser


@pytest.fixture
def every_pair(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], GivenNoise]:
    """Numbers of the grid => a batch that holds each once for every one of four signs: exact means of squares."""

    def of(numbers: list[int]) -> GivenNoise:
        i = torch.tensor(numbers).repeat_interleave(4)
        monkeypatch.setattr(SolverGrid, "pairs", lambda grid, count: (i, grid.times[i], grid.times[i - 1]))
        signs, eps = four_signs()
        return images(STD * signs.repeat(len(numbers), 1), eps.repeat(len(numbers), 1))

    return of


def roles_of(network: Multiples, schedule: NoiseSchedule = VP, kind: str = "epsilon") -> Roles:
    teacher = gaussian(constant(0.0), STD, schedule)
    if schedule is FLOW:  # the oracle predicts noise, which does not determine the clean sample at time 1
        teacher = Denoiser(_flow_gaussian, OwnWeights(nn.Module()), FLOW, "flow")
    return Roles({"teacher": teacher, "student": multiplying(network, schedule, kind)})


def _flow_gaussian(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
    levels = Levels.at(FLOW, FLOW.t_from_model_time(model_time), x_t)
    variance = (levels.alpha * STD) ** 2 + levels.sigma**2
    return (levels.sigma - levels.alpha * STD**2) / variance * x_t


def slopes(schedule: NoiseSchedule, steps: int, lowest: float = 0.0) -> list[float]:
    """By what the teacher's DDIM step from number i to i - 1 multiplies x, i = 1 ... N."""
    times = SolverGrid(schedule, steps, CPU, lowest=lowest).times
    levels = [Levels.at(schedule, t.reshape(1), torch.zeros(1)) for t in times]
    return [float(slope(levels[i], levels[i - 1])) for i in range(1, steps + 1)]


@pytest.mark.parametrize(("schedule", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_the_gradient_of_every_pair_has_its_closed_form(
    schedule: NoiseSchedule, kind: str, every_pair: Callable[[list[int]], GivenNoise]
) -> None:
    """d/da_i of v_i (a_i - a_(i-1) m_i)^2 with a_0 = 1 is 2 v_i (a_i - a_(i-1) m_i); the target carries none."""
    batch, network = every_pair(list(range(1, STEPS + 1))), Multiples(STEPS)
    LCM(solver_steps=STEPS, **PLAIN).loss(roles_of(network, schedule, kind), batch, Step(0)).total.backward()
    times, m = SolverGrid(schedule, STEPS, CPU).times, slopes(schedule, STEPS)
    a = [1.0, *network.a[1:].tolist()]
    variances = (schedule.alpha(times) * STD) ** 2 + schedule.sigma(times) ** 2
    expected = [2 * float(variances[i]) * (a[i] - a[i - 1] * m[i - 1]) / STEPS for i in range(1, STEPS + 1)]
    assert max(map(abs, expected)) > 1e-2
    torch.testing.assert_close(network.a.grad[1:], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def solved(objective: LCM, every_pair: Callable[[list[int]], GivenNoise]) -> Tensor:
    """The a_i at which each pair's gradient vanishes, one after the other from clean data on; it is linear in a_i."""
    network = Multiples(objective.solver_steps)
    cast, ends = roles_of(network), torch.zeros(2, dtype=torch.float64)
    for i in range(1, objective.solver_steps + 1):
        batch = every_pair([i])
        for guess in (0, 1):
            with torch.no_grad():
                network.a[i] = guess
            (gradient,) = torch.autograd.grad(objective.loss(cast, batch, Step(0)).total, network.a)
            ends[guess] = gradient[i]
        with torch.no_grad():
            network.a[i] = ends[0] / (ends[0] - ends[1])
    return network.a.detach()


@pytest.mark.parametrize(("lowest", "optimum"), [(0.001, 0.676324), (0.0, 0.671240)])
def test_the_optimum_is_the_product_of_the_teachers_ddim_slopes(
    lowest: float, optimum: float, every_pair: Callable[[list[int]], GivenNoise]
) -> None:
    """Data N(0, 0.7^2), 50 steps, timestep 999; Diffusers' code ends at timestep 0, ours at clean data."""
    a = solved(LCM(lowest=lowest, **PLAIN), every_pair)
    assert a[50].item() == pytest.approx(optimum, abs=1e-6)
    product = torch.tensor(slopes(VP, 50, lowest), dtype=torch.float64).cumprod(0)
    torch.testing.assert_close(a[1:], product, rtol=1e-10, atol=0)


def test_heun_steps_come_closer_to_the_exact_map(every_pair: Callable[[list[int]], GivenNoise]) -> None:
    last = VP.alpha(torch.ones(1)).item() ** 2
    exact = STD / (last * STD**2 + 1 - last) ** 0.5
    assert exact == pytest.approx(0.700833, abs=1e-6)
    errors = {solver: abs(solved(LCM(solver=solver, **PLAIN), every_pair)[50].item() - exact)
              for solver in ("ddim", "heun")}  # fmt: skip
    assert errors["heun"] < 0.5 * errors["ddim"]


@pytest.mark.parametrize("lowest", [0.0, 0.001])
def test_at_the_clean_end_the_target_is_the_solvers_sample_to_the_bit(
    lowest: float, every_pair: Callable[[list[int]], GivenNoise], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step = {}, lcm.solver_step

    def spying(*args: Any) -> Tensor:
        seen["x_s"] = step(*args)
        return seen["x_s"]

    def measuring(kind: str, found: Tensor, target: Tensor, c: float) -> Tensor:
        seen["target"] = target
        return found.flatten(1).mean(1)

    monkeypatch.setattr(lcm, "solver_step", spying)
    monkeypatch.setattr(lcm, "distance", measuring)
    LCM(lowest=lowest, **PLAIN).loss(roles_of(Multiples(50)), every_pair([1, 2]), Step(0))
    assert torch.equal(seen["target"][:4], seen["x_s"][:4])
    assert not torch.equal(seen["target"][4:], seen["x_s"][4:])


def guided_optimum(a: Tensor, told: Callable[[Condition], Tensor]) -> Denoiser:
    """f_i(x) = mu + a_i (x - alpha_i mu), whose mean mu a function of the condition says."""

    def call(module: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        t = VP.t_from_model_time(model_time)
        levels, mean = Levels.at(VP, t, x_t), told(condition)[:, None]
        i = (t * (len(a) - 1)).round().long()
        return mean + a[i][:, None] * (x_t - levels.alpha * mean)

    return Denoiser(call, OwnWeights(nn.Module()), VP, "sample")


def guided_mean(condition: Condition) -> Tensor:
    """Of N(mu_c, s^2) guided away from N(mu_u, s^2), with mu_c = label and mu_u = -0.5."""
    scale = condition.tensors["guidance"]
    return -0.5 + scale * (condition.tensors["label"] + 0.5)


def test_the_scale_that_the_student_is_told_is_the_teachers(every_pair: Callable[[list[int]], GivenNoise]) -> None:
    """With equal variances the guided teacher is a Gaussian whose mean is linear in the scale, and so is its map."""
    batch = every_pair(list(range(1, STEPS + 1)))
    conditions = {"condition": Condition({"label": torch.full((len(batch),), 0.25, dtype=torch.float64)}),
                  "null": Condition({"label": torch.full((len(batch),), -0.5, dtype=torch.float64)})}  # fmt: skip
    for name, value in conditions.items():
        object.__setattr__(batch, name, value)
    a = torch.tensor([1.0, *slopes(VP, STEPS)], dtype=torch.float64).cumprod(0)
    objective = LCM(solver_steps=STEPS, **{**PLAIN, "embed_guidance": True, "guidance": (3.0, 15.0)})
    teacher = gaussian(label, STD, VP)

    def loss(student: Denoiser) -> float:
        return objective.loss(Roles({"teacher": teacher, "student": student}), batch, Step(0)).total.item()

    assert loss(guided_optimum(a, guided_mean)) < 1e-25
    lowered = guided_optimum(a, lambda c: guided_mean(c) - (c.tensors["label"] + 0.5))  # a scale of LCM's convention
    assert loss(lowered) > 1e-3
    assert loss(guided_optimum(a, lambda c: -0.5 + 9.0 * (c.tensors["label"] + 0.5))) > 1e-3, "one scale for all"


def test_a_range_gives_every_sample_a_scale_of_its_own(every_pair: Callable[[list[int]], GivenNoise]) -> None:
    told = []

    def spying(condition: Condition) -> Tensor:
        told.append(condition.tensors["guidance"])
        return guided_mean(condition)

    roles = Roles({"teacher": gaussian(label, STD, VP), "student": guided_optimum(torch.ones(STEPS + 1), spying)})
    objective = LCM(solver_steps=STEPS, guidance=(3.0, 15.0), target_decay=0.0)
    objective.loss(roles, every_pair([1, 2, 3] * 200), Step(0))
    assert torch.equal(told[0], told[1]), "student and target are told the same"
    assert len(told[0].unique()) == 2400
    assert 3.0 <= told[0].min() < 3.2 and 14.8 < told[0].max() < 15.0


@pytest.mark.parametrize(("schedule", "kind"), KINDS[1::2], ids=["v_prediction", "flow"])
def test_where_all_data_are_one_point_the_teacher_itself_is_consistent(
    schedule: NoiseSchedule, kind: str, every_pair: Callable[[list[int]], GivenNoise]
) -> None:
    batch = every_pair(list(range(1, STEPS + 1)))
    teacher = point(0.3, schedule, kind)
    cast = Roles({"teacher": teacher, "student": teacher, "target": teacher})
    objective = LCM(solver_steps=STEPS, **{**PLAIN, "target_decay": 0.95})
    loss = objective.loss(cast, batch, Step(0)).total
    # the target of the last pair is where the solver's step ended, which is the point as well
    assert loss.item() < 1e-24


# ---- a real network ------------------------------------------------------------------------------------------------


class Setting:
    """Three networks in float64 with random weights, and everything that is drawn, chosen beforehand."""

    def __init__(self, family: ModelFamily, monkeypatch: pytest.MonkeyPatch, objective: LCM, *, lora: bool) -> None:
        family.network().double()
        self.family, self.objective = family, objective
        self.cast = Cast(family, objective.roles(), lora={"student": LINEAR} if lora else None)
        family.network().double()  # adapters come in float32
        for seed, role in enumerate(("student", "target")):
            if role in (*self.cast.trained, *self.cast.recorded):
                scramble(self.cast.parameters(role), seed, 0.1)
        generator = torch.Generator().manual_seed(3)
        self.i = torch.tensor([1, 2, 27, 50])
        self.scales = torch.tensor([3.0, 7.25, 11.5, 15.0], dtype=torch.float64)
        self.x0, self.eps = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64, generator=generator)
        self.condition = family.encode_prompts(["red", "a ring", "b", "c"]).to(torch.float64)
        self.null = family.null_condition(4).to(torch.float64)
        self.batch = GivenNoise(self.condition, self.null, (4, 8, 8), CPU)
        object.__setattr__(self.batch, "z", self.eps)
        object.__setattr__(self.batch, "latents", self.x0)
        monkeypatch.setattr(SolverGrid, "pairs", lambda grid, n: (self.i, grid.times[self.i], grid.times[self.i - 1]))
        monkeypatch.setattr(lcm, "sample_guidance", lambda *args: self.scales)

    def gradients(self) -> dict[str, Tensor]:
        """Of our loss, by the student's parameters; nobody else gets any."""
        with self.cast.trainable(("student",)):
            self.objective.loss(self.cast, self.batch, Step(0)).total.backward()
        parameters = self.cast.parameters("student")
        own = {id(p) for p in parameters.values()}
        networks = [self.cast.denoiser(role).weights.network for role in self.objective.roles()]
        assert all(p.grad is None for n in networks for p in n.parameters() if id(p) not in own)
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}


LINEAR = LORA.__class__(rank=2, alpha=4.0, targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"))


def plain_loss(setting: Setting, student: Callable, target: Callable, teacher: Callable, lowest: int | None) -> Tensor:
    """LCM's training step from its formulas: timesteps are integers, w is one less than the scale.

    Args:
        setting: the tensors.
        student: (x, timestep, w) => noise.
        target: the same, for the target.
        teacher: (x, timestep, text) => noise.
        lowest: the timestep that counts as clean; None: there alpha = 1.
    """
    table = DDIMScheduler(**BETAS).alphas_cumprod.double()

    def level(timesteps: Tensor) -> tuple[Tensor, Tensor]:
        bar = torch.where(timesteps < 0, 1.0, table[timesteps.clamp(min=0)])[:, None, None, None]
        return bar.sqrt(), (1 - bar).sqrt()

    w = setting.scales - 1
    t = torch.tensor(FIFTY)[setting.i - 1]
    s = torch.where(t == 19, -1 if lowest is None else lowest, t - 20)
    (a_t, b_t), (a_s, b_s) = level(t), level(s)
    z_t = a_t * setting.x0 + b_t * setting.eps
    with torch.no_grad():
        with_text = teacher(z_t, t, setting.condition.tensors["prompt_embeds"])
        without = teacher(z_t, t, setting.null.tensors["prompt_embeds"])
        noise = with_text + w[:, None, None, None] * (with_text - without)
        z_s = a_s * (z_t - b_t * noise) / a_t + b_s * noise
        y = (z_s - b_s * target(z_s, s.clamp(min=0), w)) / a_s
        y[t == 19] = z_s[t == 19]  # c_skip = 1 and c_out = 0
    p = (z_t - b_t * student(z_t, t, w)) / a_t
    return (((p - y) ** 2 + 1e-3**2).sqrt() - 1e-3).mean()


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() < 1e-6 * largest, name


@pytest.mark.parametrize("lowest", [0.0, 0.001])
def test_the_gradient_is_that_of_a_plain_implementation(
    sd: ModelFamily, monkeypatch: pytest.MonkeyPatch, lowest: float
) -> None:
    setting = Setting(sd, monkeypatch, LCM(lowest=lowest), lora=False)
    text = setting.condition.tensors["prompt_embeds"]

    def told(role: str) -> Callable:
        network = setting.cast.denoiser(role).weights.network

        def call(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
            embedded = sd.pipeline.get_guidance_scale_embedding(w.float(), embedding_dim=256).double()
            return network(x, t, encoder_hidden_states=text, timestep_cond=embedded).sample

        return call

    student = setting.cast.denoiser("student").weights.network
    student.requires_grad_(True)
    teacher = sd.pipeline.unet
    loss = plain_loss(setting, told("student"), told("target"), lambda x, t, c: teacher(x, t, c).sample,
                      None if lowest == 0 else 0)  # fmt: skip
    names, values = zip(*student.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, values), strict=True))
    student.requires_grad_(False)
    found = setting.gradients()
    assert "time_embedding.cond_proj.weight" in found
    assert_same_gradients(found, expected)


def test_the_gradient_of_an_adapter_is_that_of_a_plain_implementation_with_its_weights_written_out(
    sd: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LCM-LoRA: the student is W + alpha / rank B A, the teacher W, the target the student itself."""
    plain = sd.plain_network().double()
    plain.load_state_dict(sd.network().state_dict())
    setting = Setting(sd, monkeypatch, LCM(embed_guidance=False, target_decay=0.0), lora=True)
    text = setting.condition.tensors["prompt_embeds"]
    adapter = {name: p.detach().clone().requires_grad_(True) for name, p in setting.cast.parameters("student").items()}
    weights = {}
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weights[f"{layer}.weight"] = plain.get_parameter(f"{layer}.weight") + 2.0 * (
                adapter[f"{layer}.lora_B.weight"] @ a
            )

    def student(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        called = torch.func.functional_call(plain, weights, (x, t), {"encoder_hidden_states": text})
        return called.sample

    loss = plain_loss(setting, student, student, lambda x, t, c: plain(x, t, c).sample, None)
    expected = dict(zip(adapter, torch.autograd.grad(loss, list(adapter.values())), strict=True))
    assert_same_gradients(setting.gradients(), expected)


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_roles_are_those_of_the_paper_and_of_lcm_lora() -> None:
    assert LCM().roles() == {"teacher": Frozen(), "student": Trained(embeds_guidance=True),
                             "target": Recorded("student")}  # fmt: skip
    assert LCM(embed_guidance=False, target_decay=0.0).roles() == {"teacher": Frozen(), "student": Trained()}
    (phase,) = LCM().phases(0)
    assert (phase.updates, phase.stream) == (("student",), "images")


def test_a_student_that_takes_the_scale_is_called_with_one_and_another_with_none() -> None:
    four = (999, 759, 499, 259)
    assert LCM().inference() == InferenceSpec(four, guidance_scale=9.0, embeds_guidance=True)
    assert LCM(call_guidance=8.0).inference().guidance_scale == 8.0
    assert LCM(guidance=3.0).inference().guidance_scale == 3.0
    assert LCM(embed_guidance=False).inference() == InferenceSpec(four)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call_guidance": 2.0}, "from 3 to 15"),
        ({"call_guidance": 8.0, "embed_guidance": False}, "leave it out"),
        ({"guidance": (5.0, 3.0)}, "lower scale first"),
        ({"target_decay": 1.0}, "decay of the target"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LCM(**options)


def test_the_teachers_steps_are_of_the_published_grid() -> None:
    times = SolverGrid(VP, 50, CPU).times
    assert VP.model_time(times[1:]).tolist() == FIFTY
    assert set(LCM().timesteps) <= set(FIFTY), "the student is called where it has been trained"
