"""Several roles on one frozen network: the same numbers as with a network each, and the base never changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters import LoraSettings, SharedNetwork
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.data.cache import weights_fingerprint
from stepdistill.denoiser import AdapterWeights, Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Frozen, Trained
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.prediction import add_noise
from tests.tiny import LORA, scramble, trainer_of, weights_of


ROLES = ("student", "critic")
COUNT = 2


@pytest.fixture
def double_sd(sd: ModelFamily) -> ModelFamily:
    """In float64, so that agreement is not a matter of luck."""
    sd.network().double()
    return sd


def shared_roles(family: ModelFamily) -> SharedNetwork:
    shared = SharedNetwork(family.network())
    for seed, role in enumerate(ROLES):
        shared.add(role, LORA)
        scramble(shared.parameters(role), seed)
    shared.network.double()
    return shared


def own_copy(family: ModelFamily, shared: SharedNetwork, role: str) -> nn.Module:
    """A separate plain network with the adapter folded into its weights."""
    network = family.plain_network()
    network.load_state_dict(shared.plain_state(role))
    return network


def condition_of(family: ModelFamily) -> Condition:
    return family.encode_prompts(["red", "a ring"]).to(torch.float64)


def game(family: ModelFamily, student: Denoiser, critic: Denoiser) -> Tensor:
    """One graph through both roles, as losses that differentiate through the critic's input have it."""
    generator = torch.Generator().manual_seed(3)
    z, eps = (torch.randn(COUNT, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    condition = condition_of(family)
    x0 = student(z, torch.ones(COUNT, dtype=torch.float64), condition).native
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    said = critic(add_noise(critic.schedule, x0, t, eps), t, condition).native
    return (said - x0).square().mean() + 0.1 * said.mean()


def chain_rule(gradient: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dW with W = W0 + (alpha / rank) B A => dL/dA, dL/dB, for linear layers and convolutions."""
    scale = LORA.alpha / LORA.rank
    flat = gradient.flatten(1)
    grad_a = (scale * lora_b.flatten(1).T @ flat).reshape(lora_a.shape)
    grad_b = (scale * flat @ lora_a.flatten(1).T).reshape(lora_b.shape)
    return grad_a, grad_b


def test_a_scrambled_adapter_computes_what_a_merged_copy_computes(double_sd: ModelFamily) -> None:
    shared = shared_roles(double_sd)
    x_t, t = torch.randn(COUNT, 4, 8, 8, dtype=torch.float64), torch.full((COUNT,), 0.5)
    said = {}
    for role in (*ROLES, None):
        view = double_sd.denoiser(AdapterWeights(shared, role))
        plain = double_sd.denoiser(OwnWeights(own_copy_of_base(double_sd, shared, role)))
        said[role] = view(x_t, t, condition_of(double_sd)).native
        torch.testing.assert_close(said[role], plain(x_t, t, condition_of(double_sd)).native, rtol=0, atol=1e-10)
    assert (said["student"] - said[None]).abs().max() > 0.01
    assert (said["student"] - said["critic"]).abs().max() > 0.01


def own_copy_of_base(family: ModelFamily, shared: SharedNetwork, role: str | None) -> nn.Module:
    network = type(shared.network).from_config(shared.network.config).double().eval()
    network.load_state_dict(shared.plain_state(role))
    return network


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_gradients_of_two_roles_in_one_graph_are_those_of_separate_full_copies(
    double_sd: ModelFamily, checkpointing: bool
) -> None:
    shared = shared_roles(double_sd)
    copies = {role: own_copy_of_base(double_sd, shared, role).requires_grad_(True) for role in ROLES}
    reference = game(double_sd, *(Denoiser(double_sd.forward, _Kept(copies[r]), double_sd.schedule, "epsilon")
                                  for r in ROLES))  # fmt: skip
    reference.backward()

    if checkpointing:
        shared.enable_checkpointing()
    for role in ROLES:
        for parameter in shared.parameters(role).values():
            parameter.requires_grad_(True)
    loss = game(double_sd, *(double_sd.denoiser(AdapterWeights(shared, role)) for role in ROLES))
    with shared.routed("critic"):  # whatever is active by then must not matter
        loss.backward()

    assert loss.item() == pytest.approx(reference.item(), abs=1e-10)
    for role in ROLES:
        parameters = shared.parameters(role)
        weights = dict(copies[role].named_parameters())
        layers = {name.partition(".lora_")[0] for name in parameters}
        assert len(layers) > 10
        for layer in layers:
            a, b = parameters[f"{layer}.lora_A.weight"], parameters[f"{layer}.lora_B.weight"]
            grad_a, grad_b = chain_rule(weights[f"{layer}.weight"].grad, a.detach(), b.detach())
            torch.testing.assert_close(a.grad, grad_a, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(b.grad, grad_b, rtol=1e-7, atol=1e-10)
            assert a.grad.abs().max() > 0, f"{role}, {layer}: a gradient of zero compares nothing"


class _Kept(OwnWeights):
    """A network whose requires_grad is the test's business."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network


def test_checkpointing_really_recomputes_and_gives_the_same_loss_and_gradients(double_sd: ModelFamily) -> None:
    shared = shared_roles(double_sd)
    calls = []
    network = shared.network
    # before the call: a recomputation stops as soon as it has what it needs, so hooks after the call may not run
    network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(shared._route))
    results = []
    for turn in range(2):
        if turn == 1:
            shared.enable_checkpointing()
        calls.clear()
        for role in ROLES:
            for parameter in shared.parameters(role).values():
                parameter.requires_grad_(True).grad = None
        loss = game(double_sd, *(double_sd.denoiser(AdapterWeights(shared, role)) for role in ROLES))
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for r in ROLES for p in shared.parameters(r).values()]))
        assert calls == (["student", "critic"] if turn == 0 else ["student", "critic", "critic", "student"])
    assert results[0][0] == results[1][0]
    for stored, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=1e-9, atol=1e-12)


def test_a_forward_pass_of_another_role_between_forward_and_backward_changes_nothing(double_sd: ModelFamily) -> None:
    shared = shared_roles(double_sd)
    shared.enable_checkpointing()
    student, critic = (double_sd.denoiser(AdapterWeights(shared, role)) for role in ROLES)
    x_t, t = torch.randn(COUNT, 4, 8, 8, dtype=torch.float64), torch.full((COUNT,), 0.5)
    gradients = []
    for disturbed in (False, True):
        for parameter in shared.parameters("student").values():
            parameter.requires_grad_(True).grad = None
        loss = student(x_t, t, condition_of(double_sd)).native.square().mean()
        if disturbed:
            with torch.no_grad():
                critic(x_t, t, condition_of(double_sd))
            shared._apply("critic")
        loss.backward()
        gradients.append([p.grad.clone() for p in shared.parameters("student").values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(p.grad is None for p in shared.parameters("critic").values())


def test_routing_never_touches_requires_grad(sd: ModelFamily) -> None:
    shared = SharedNetwork(sd.network())
    for role in ROLES:
        shared.add(role, LORA)
    for parameter in shared.parameters("student").values():
        parameter.requires_grad_(True)
    before = {name: p.requires_grad for name, p in shared.network.named_parameters()}
    assert sum(before.values()) == len(shared.parameters("student"))
    for route in ("critic", None, "student", "critic"):
        with shared.routed(route):
            assert {name: p.requires_grad for name, p in shared.network.named_parameters()} == before
    assert {name: p.requires_grad for name, p in shared.network.named_parameters()} == before


def test_a_second_adapter_does_not_freeze_or_change_the_first(sd: ModelFamily) -> None:
    shared = SharedNetwork(sd.network())
    shared.add("student", LORA)
    scramble(shared.parameters("student"))
    values = {name: p.detach().clone() for name, p in shared.parameters("student").items()}
    for parameter in shared.parameters("student").values():
        parameter.requires_grad_(True)
    shared.add("critic", LoraSettings(3, 3.0, ("to_q", "conv2")))
    assert all(p.requires_grad for p in shared.parameters("student").values())
    assert not any(p.requires_grad for p in shared.parameters("critic").values())
    assert shared.parameters("student").keys() == values.keys()
    assert all(torch.equal(p, values[name]) for name, p in shared.parameters("student").items())
    view = sd.denoiser(AdapterWeights(shared, "student"))
    view(torch.randn(1, 4, 8, 8), torch.ones(1), sd.encode_prompts(["a"])).native.sum().backward()
    assert all(p.grad is not None for p in shared.parameters("student").values())


def test_the_route_comes_back_after_an_error_and_nests(sd: ModelFamily) -> None:
    shared = SharedNetwork(sd.network())
    for role in ROLES:
        shared.add(role, LORA)
    with shared.routed("student"):
        with pytest.raises(RuntimeError), shared.routed("critic"):
            raise RuntimeError
        assert shared._route == "student"
    assert shared._route is None


def test_a_fresh_adapter_changes_no_output_bit(sd: ModelFamily) -> None:
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    before = sd.denoiser()(x_t, t, condition).native
    shared = SharedNetwork(sd.network())
    shared.add("student", LORA)
    for route in (None, "student"):
        assert torch.equal(sd.denoiser(AdapterWeights(shared, route))(x_t, t, condition).native, before)


def test_targets_that_match_nothing_are_a_users_error_that_names_them(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"role 'student'.*UNet2DConditionModel.*to_nowhere"):
        SharedNetwork(sd.network()).add("student", LoraSettings(2, 2.0, ("to_nowhere",)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_ten_steps_on_a_shared_base_leave_its_bytes_and_the_teachers_outputs_alone(
    sd: ModelFamily, checkpointing: bool
) -> None:
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    print_before = weights_fingerprint(sd.network())
    said_before = sd.denoiser()(x_t, t, condition).native
    trainer = trainer_of(
        sd, DMD2(critic_updates=1), lora={"student": LORA, "critic": LORA}, steps=10, checkpointing=checkpointing
    )
    start = weights_of(trainer)
    trainer.run()
    moved = weights_of(trainer)
    assert not any(torch.equal(start[name], moved[name]) for name in start), "every adapter weight was trained"
    assert torch.equal(trainer.cast.denoiser("teacher")(x_t, t, condition).native, said_before)
    assert (trainer.cast.denoiser("student")(x_t, t, condition).native - said_before).abs().max() > 1e-4
    trainer.cast.release()
    assert weights_fingerprint(sd.network()) == print_before
    assert torch.equal(sd.denoiser()(x_t, t, condition).native, said_before)


def test_checkpointing_does_not_change_ten_steps_of_training(sd_folder: str) -> None:
    ends = []
    for checkpointing in (False, True):
        family = load_family(sd_folder)
        trainer = trainer_of(
            family, DMD2(critic_updates=1), lora={"student": LORA}, steps=4, checkpointing=checkpointing
        )
        trainer.run()
        ends.append(weights_of(trainer))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_full_copies_and_adapters_start_as_the_teacher(sd: ModelFamily) -> None:
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    expected = sd.denoiser()(x_t, t, condition).native
    roles = {"teacher": Frozen(), "student": Trained(), "critic": Trained()}
    cast = Cast(sd, roles, lora={"student": LORA})
    for role in roles:
        assert torch.equal(cast.denoiser(role)(x_t, t, condition).native, expected)
    assert {role: kind for role, kind, _, _ in cast.summary()} == {
        "teacher": "frozen", "student": "LoRA rank 2", "critic": "full copy",
    }  # fmt: skip
    own = {role: count for role, _, count, _ in cast.summary()}
    base = sum(p.numel() for p in sd.plain_network().parameters())
    assert own["teacher"] == 0
    assert own["critic"] == base
    assert 0 < own["student"] < base
    assert not set(map(id, cast.parameters("critic").values())) & set(map(id, cast.parameters("student").values()))


def test_two_casts_of_one_recipe_start_with_the_same_adapter_bits(sd_folder: str) -> None:
    """Whatever was drawn before: every process, and every resumed run, must begin with the same adapter."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        cast = Cast(load_family(sd_folder), {"student": Trained(), "critic": Trained()},
                    lora={"student": LORA, "critic": LORA})  # fmt: skip
        states.append({role: cast.state(role).tensors for role in ("student", "critic")})
    for role in ("student", "critic"):
        assert all(torch.equal(states[0][role][name], states[1][role][name]) for name in states[0][role])
    name = next(n for n in states[0]["student"] if "lora_A" in n)
    assert not torch.equal(states[0]["student"][name], states[0]["critic"][name])
