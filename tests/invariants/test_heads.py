"""Heads, recorded roles, parked weights and inner features: what they compute, and that a run keeps them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from stepdistill import finish
from stepdistill.adapters import LoraSettings
from stepdistill.cast import Cast
from stepdistill.checkpoint import tensors_equal
from stepdistill.cli import app
from stepdistill.condition import Condition
from stepdistill.console import Display
from stepdistill.data.cache import EncodedTexts
from stepdistill.discriminator import Discriminator, MapHead, TokenHead
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Frozen, Head, Loss, Phase, Recorded, Role, Step, Trained
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.run_folder import RunFolder
from stepdistill.streams import open_batches
from stepdistill.trainer import Trainer
from tests.invariants.test_resume import assert_same_state, final_weights, last_checkpoint
from tests.tiny import LORA, PaintedLatents, scramble, tiny_recipe, trainer_of, weights_of


GAN = {"guidance": 2.0, "critic_updates": 1, "gan_weight": 0.1}
ROLES: Mapping[str, Role] = {"teacher": Frozen(), "critic": Trained(), "student": Trained()}
COUNT = 2
PROMPTS = {"sd": ["red", "a ring"], "dit": ["3", "7"]}
LAYERS = {"sd": ("down_blocks.1.resnets.0", "mid_block"), "dit": ("transformer_blocks.0",)}


# ---- features of inner layers --------------------------------------------------------------------------------------


class Setting:
    """Three roles in float64 on a tiny network, with random weights that are a function of the role."""

    def __init__(self, folder: str, lora: bool, checkpointing: bool = False) -> None:
        self.family = load_family(folder)
        self.family.network().double()
        settings = dict.fromkeys(("student", "critic"), LORA) if lora else {}
        self.cast = Cast(self.family, ROLES, lora=settings, checkpointing=checkpointing)
        self.cast.shared.network.double()
        for seed, role in enumerate(("student", "critic")):
            if lora:
                scramble(self.cast.parameters(role), seed)
            else:
                nudge(self.cast.parameters(role), seed)
        generator = torch.Generator().manual_seed(7)
        self.x_t = torch.randn(COUNT, 4, 8, 8, dtype=torch.float64, generator=generator).requires_grad_(True)
        self.t = torch.tensor([0.3, 0.8], dtype=torch.float64)
        self.condition: Condition = self.family.encode_prompts(PROMPTS[self.family.name]).to(torch.float64)

    def whole_pass(self, layers: Sequence[str]) -> list[Tensor]:
        """Outputs of inner modules of a pass that goes through to its end."""
        denoiser, found = self.cast.denoiser("critic"), {}
        network = denoiser.weights.network
        handles = [
            network.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
            for name in layers
        ]
        denoiser(self.x_t, self.t, self.condition)
        for handle in handles:
            handle.remove()
        return [found[name] for name in layers]

    def features(self, layers: Sequence[str]) -> list[Tensor]:
        return self.cast.denoiser("critic").features(self.x_t, self.t, self.condition, layers)

    def gradients(self, features: Sequence[Tensor], active: str | None = None) -> dict[str, Tensor | None]:
        """Of a random projection of the features, by the input and by the critic's weights."""
        generator = torch.Generator().manual_seed(8)
        weights = [torch.randn(f.shape, dtype=f.dtype, generator=generator) for f in features]
        loss = sum((w * f).sum() for w, f in zip(weights, features, strict=True))
        parameters = self.cast.parameters("critic")
        with self.cast.shared.routed(active):  # whatever is active by then must not matter
            found = torch.autograd.grad(loss, [self.x_t, *parameters.values()], allow_unused=True)
        return dict(zip(("x_t", *parameters), found, strict=True))


def nudge(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """A random step away from the teacher, so that roles differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("name", "lora", "checkpointing"),
    [
        ("sd", True, False),
        ("sd", False, True),
        ("sd", True, True),
        ("dit", False, False),
        ("dit", False, True),
        ("dit", True, True),
    ],
)
def test_features_and_their_gradients_are_those_of_a_whole_pass(
    name: str, lora: bool, checkpointing: bool, sd_folder: str, dit_folder: str
) -> None:
    folder, layers = {"sd": sd_folder, "dit": dit_folder}[name], LAYERS[name]
    reference, setting = Setting(folder, lora), Setting(folder, lora, checkpointing)
    with reference.cast.trainable(("critic",)), setting.cast.trainable(("critic",)):
        whole, cut = reference.whole_pass(layers), setting.features(layers)
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
        expected, found = reference.gradients(whole), setting.gradients(cut, "student" if lora else None)
    reached = [key for key, gradient in expected.items() if gradient is not None]
    assert len(reached) > 8
    for key in expected:
        assert (found[key] is None) == (expected[key] is None), key
        if expected[key] is not None:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-10, msg=key)
            assert expected[key].abs().max() > 0, f"{key}: a gradient of zero compares nothing"
    if name == "sd":
        assert not any(key.startswith(("up_blocks", "conv_out")) for key in reached), "behind the last layer"


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_under_checkpointing_the_blocks_before_a_feature_are_computed_twice(
    name: str, sd_folder: str, dit_folder: str
) -> None:
    """Otherwise the comparison above would compare nothing; the recomputation takes the route of its forward pass."""
    setting = Setting({"sd": sd_folder, "dit": dit_folder}[name], lora=True, checkpointing=True)
    block = {"sd": "down_blocks.0.resnets.0", "dit": "transformer_blocks.0"}[name]
    routes: list[Any] = []
    module = setting.cast.shared.network.get_submodule(block)
    module.register_forward_pre_hook(lambda *_: routes.append(setting.cast.shared._route))
    with setting.cast.trainable(("critic",)):
        setting.gradients(setting.features(LAYERS[name][-1:]), "student")
    assert routes == ["critic", "critic"]
    assert setting.cast.shared._route is None


def test_the_pass_ends_at_the_last_layer_and_leaves_no_hook(sd: ModelFamily) -> None:
    calls: list[str] = []
    network = sd.network()
    for name in ("down_blocks.0", "mid_block", "up_blocks.0", "conv_out"):
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    (feature,) = sd.denoiser().features(x_t, t, condition, ("mid_block",))
    assert feature.shape == (COUNT, 16, 4, 4)
    assert calls == ["down_blocks.0", "mid_block"]
    assert not any(module._forward_hooks for module in network.modules())
    calls.clear()
    sd.denoiser()(x_t, t, condition)
    assert calls[-1] == "conv_out"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("nowhere",), r"UNet2DConditionModel has no module 'nowhere'; see its named_modules"),
        (("mid_block", "nowhere"), r"no module 'nowhere'"),
        (("up_blocks.0", "mid_block"), r"does not come by its module 'up_blocks.0' before it ends at 'mid_block'"),
        (("down_blocks.0.downsamplers.0.norm",), "has no module|does not come by"),
    ],
)
def test_layers_that_the_pass_does_not_meet_are_a_users_error(sd: ModelFamily, layers: Any, message: str) -> None:
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    with pytest.raises(UserError, match=message):
        sd.denoiser().features(x_t, t, condition, layers)
    assert not any(module._forward_hooks for module in sd.network().modules())


# ---- heads ---------------------------------------------------------------------------------------------------------


def cast_with_head(family: ModelFamily, layers: tuple[str, ...] = (), **options: Any) -> Cast:
    return Cast(family, {**ROLES, "discriminator": Head(Discriminator, layers)}, **options)


def test_a_head_fits_the_features_of_its_layers_and_is_trained_like_any_role(sd: ModelFamily) -> None:
    cast = cast_with_head(sd, LAYERS["sd"], lora={"critic": LORA, "student": LORA})
    head = cast.head("discriminator")
    assert [type(part) for part in head.module.heads] == [MapHead, MapHead]
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    assert head(cast.denoiser("critic"), x_t, t, condition).shape == (COUNT, 2)
    parameters = cast.parameters("discriminator")
    assert parameters.keys() == dict(head.module.named_parameters()).keys()
    assert "discriminator" in cast.trained
    assert not any(p.requires_grad for p in parameters.values())
    with cast.trainable(("discriminator",)):
        assert all(p.requires_grad for p in parameters.values())
        assert not any(p.requires_grad for role in ("critic", "student") for p in cast.parameters(role).values())
    count = sum(p.numel() for p in parameters.values())
    assert ("discriminator", "head", count, count) in cast.summary()


def test_a_head_on_a_transformer_judges_tokens(dit: ModelFamily) -> None:
    cast = cast_with_head(dit)
    head = cast.head("discriminator")
    assert [type(part) for part in head.module.heads] == [TokenHead]
    told = head(cast.denoiser("teacher"), torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5),
                dit.encode_prompts(PROMPTS["dit"]))  # fmt: skip
    assert told.shape == (COUNT, 1)


class Packed(nn.Linear):
    """A linear layer whose parameter is bytes, as a quantised one's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.bias, self.plain = layer.bias, [layer.weight]
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.plain[0], self.bias)


def test_a_head_is_built_on_a_quantised_network_whose_first_parameter_is_bytes() -> None:
    family = load_family("tiny:flux")
    network = family.network()
    path = next(name for name, _ in network.named_parameters()).removesuffix(".weight")
    network.set_submodule(path, Packed(network.get_submodule(path)))
    assert next(network.parameters()).dtype == torch.uint8
    cast = Cast(family, {"teacher": Frozen(), "discriminator": Head(Discriminator)}, size=16)
    assert {p.dtype for p in cast.parameters("discriminator").values()} == {torch.float32}


def test_a_head_is_built_for_the_size_of_the_runs_images(sd: ModelFamily) -> None:
    cast = cast_with_head(sd, size=8)  # latents of 4 x 4, so 2 x 2 are left at the bottleneck
    x_t, t, condition = torch.randn(COUNT, 4, 4, 4), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    assert cast.head("discriminator")(cast.denoiser("teacher"), x_t, t, condition).shape == (COUNT, 1)


def test_a_head_starts_with_the_same_bits_whatever_was_drawn_before(sd_folder: str) -> None:
    family = load_family(sd_folder)
    heads = []
    for disturbance, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(disturbance)
        before = torch.random.get_rng_state()
        cast = Cast(family, {"teacher": Frozen(), "discriminator": Head(Discriminator)}, seed=seed)
        heads.append(cast.state("discriminator").tensors)
        assert torch.equal(torch.random.get_rng_state(), before), "building a head draws from its own seed"
    assert tensors_equal(heads[0], heads[1])
    assert not tensors_equal(heads[0], heads[2])


# ---- recorded roles, parked weights, renamed roles -----------------------------------------------------------------


@pytest.mark.parametrize("lora", [{}, {"critic": LORA}], ids=["full", "lora"])
def test_a_recorded_role_starts_as_the_teacher_and_holds_what_is_copied_into_it(
    sd: ModelFamily, lora: Mapping[str, LoraSettings]
) -> None:
    cast = Cast(sd, {**ROLES, "target": Recorded(like="critic")}, lora=lora)
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])

    def said(role: str) -> Tensor:
        return cast.denoiser(role)(x_t, t, condition).native

    teacher = said("teacher")
    assert torch.equal(said("target"), teacher)
    assert "target" not in cast.trained
    assert ("target", "recorded", 0) in [(role, kind, own) for role, kind, own, _ in cast.summary()]
    (scramble if lora else nudge)(cast.parameters("critic"), 1)
    assert torch.equal(said("target"), teacher)
    cast.copy("critic", "target")
    assert torch.equal(said("target"), said("critic"))
    assert not torch.equal(said("target"), teacher)
    cast.park("critic", "way-point")
    recorded = said("critic")
    nudge(cast.parameters("critic"), 2)
    assert torch.equal(said("target"), recorded), "a copy is no reference"
    cast.copy("critic", "target")
    cast.fetch("way-point", "target")
    assert torch.equal(said("target"), recorded), "parked weights are no references"
    assert not torch.equal(said("critic"), recorded)


def test_weights_of_another_kind_cannot_be_copied(sd: ModelFamily) -> None:
    cast = Cast(sd, ROLES, lora={"critic": LORA})
    with pytest.raises(UserError, match="role 'critic' does not fit"):
        cast.copy("critic", "student")
    cast.park("critic", "a")
    with pytest.raises(UserError, match="parked as 'a' does not fit"):
        cast.fetch("a", "student")


def test_a_roles_state_leaves_the_device_to_later_stages(sd: ModelFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_an_accelerator(value: Tensor) -> Tensor:
        with FakeTensorMode():
            return torch.empty(value.shape, device="cuda")

    cast = Cast(sd, ROLES, lora={"critic": LORA, "student": LORA})
    monkeypatch.setattr("stepdistill.cast.whole", on_an_accelerator)
    assert {value.device.type for value in cast.state("student").tensors.values()} == {"cpu"}


@pytest.mark.parametrize("key", ["", "a/b", "..\\a"])
def test_a_key_that_cannot_be_a_files_name_is_refused(sd: ModelFamily, key: str) -> None:
    with pytest.raises(AssertionError, match="file's name"):
        Cast(sd, ROLES).park("critic", key)


def test_a_renamed_cast_means_another_role_in_everything_it_does(sd: ModelFamily) -> None:
    cast = Cast(sd, {**ROLES, "target": Recorded(like="critic")})
    nudge(cast.parameters("target"), 3)
    view = cast.renamed({"teacher": "target"})
    x_t, t, condition = torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 0.5), sd.encode_prompts(["red", "b"])
    expected = cast.denoiser("target")(x_t, t, condition).native
    assert torch.equal(view.denoiser("teacher")(x_t, t, condition).native, expected)
    assert not torch.equal(cast.denoiser("teacher")(x_t, t, condition).native, expected)
    critic = cast.denoiser("critic")(x_t, t, condition).native
    assert torch.equal(view.denoiser("critic")(x_t, t, condition).native, critic)
    view.copy("teacher", "critic")
    assert tensors_equal(cast.parameters("critic"), cast.parameters("target"))
    view.park("teacher", "a")
    assert tensors_equal(cast.parked["a"], cast.parameters("target"))
    twice = view.renamed({"guide": "teacher"})
    assert torch.equal(twice.denoiser("guide")(x_t, t, condition).native, expected)


# ---- a run with everything that a checkpoint can hold --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recording(DMD2):
    """DMD2 whose student looks up to a recorded role, which holds what the critic was some iterations ago."""

    def roles(self) -> Mapping[str, Role]:
        return {**super().roles(), "target": Recorded(like="critic")}

    def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        return super().student_loss(cast.renamed({"teacher": "target"}), batch, step)

    def after_step(self, cast: Cast, step: int) -> None:
        if step % 2 == 0:
            cast.park("critic", "early")
        else:
            cast.fetch("early", "target")


def gan_recipe(teacher: str, output: Path, **changes: Any) -> dict[str, Any]:
    """LoRA by default, a full critic, a head, recorded and parked weights, images from a folder."""
    images = output.parent / "images"
    images.mkdir(exist_ok=True)
    for number, caption in enumerate("abcde"):
        Image.new("RGB", (16, 16), (40 * number, 200 - 30 * number, 90)).save(images / f"{caption}.png")
        (images / f"{caption}.txt").write_text(caption)
    content = tiny_recipe(teacher, output, checkpoints={"every": 1, "keep": 6})
    content["data"] |= {"images": str(images), "size": 16, "count": 8}
    content["export"] = {"pipeline": True, "lora": False}
    (stage,) = content["stages"]
    stage["steps"] = 4
    stage["objective"] = {"name": "tests.invariants.test_heads:Recording", **GAN}
    stage["players"]["default"]["weights"] = {"lora": {"rank": 3}}
    stage["players"]["critic"] = {"weights": "full"}
    return {**content, **changes}


class Killed(BaseException):
    """The end of a process in the middle of an iteration."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run dies when it has logged this step, before it saves it."""
    report = Trainer._report

    def dying(self: Trainer, values: Mapping[str, float]) -> None:
        report(self, values)
        if self.step == step:
            monkeypatch.setattr(Trainer, "_report", report)
            raise Killed

    monkeypatch.setattr(Trainer, "_report", dying)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are compared with fresh processes elsewhere."""
    monkeypatch.setattr(finish, "check", lambda *_: 0.0)


@pytest.fixture(scope="module")
def whole_run(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that nobody disturbed; its checkpoints are all there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "check", lambda *_: 0.0)
        content = gan_recipe(sd_folder, tmp_path_factory.mktemp("heads") / "run")
        yield train(Recipe.from_mapping(content)).folder


@pytest.mark.usefixtures("unchecked")
def test_a_killed_run_with_a_head_and_parked_weights_ends_with_the_same_bits(
    sd_folder: str, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_mapping(gan_recipe(sd_folder, tmp_path / "run"))
    kill_at(monkeypatch, 2)
    with pytest.raises(Killed):
        train(recipe)
    # between parking the weights and fetching them
    assert RunFolder(tmp_path / "run").checkpoints.steps() == [1]
    train(recipe)

    assert tensors_equal(final_weights(tmp_path / "run"), final_weights(whole_run))
    roles, state = last_checkpoint(tmp_path / "run")
    expected_roles, expected_state = last_checkpoint(whole_run)
    assert roles.keys() == {"student", "critic", "discriminator", "target", "parked-early"}
    for role in roles:
        assert tensors_equal(roles[role], expected_roles[role]), role
    assert not tensors_equal(roles["target"], roles["critic"])
    assert_same_state(state, expected_state)
    first, _ = RunFolder(whole_run).checkpoints.load(1)
    for role, tensors in roles.items():
        assert not tensors_equal(tensors, first[role]), f"{role}: what never changes compares nothing"
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (tmp_path / "run", whole_run)]
    timing = {"images_per_second": 0, "seconds": 0}
    a, b = ([{**json.loads(line), **timing} for line in lines] for lines in logs)
    assert a == b
    assert {"critic", "discriminator", "matching", "adversarial", "discriminator/gradient_norm"} <= a[-1].keys()


def test_every_step_of_a_game_with_a_head_can_be_resumed_from(sd_folder: str, tmp_path: Path) -> None:
    def make(folder: Path) -> Trainer:
        trainer = trainer_of(load_family(sd_folder), Recording(**GAN), lora={"student": LORA, "critic": LORA},
                             folder=folder, steps=3, checkpoint_every=1, player={"ema": 0.9})  # fmt: skip
        trainer.batches.latents = PaintedLatents()
        assert trainer.checkpoints is not None
        trainer.checkpoints._keep = 4
        return trainer

    whole = make(tmp_path / "whole")
    whole.run()
    for step in (1, 2):
        resumed = make(tmp_path / f"resumed-{step}")
        assert whole.checkpoints is not None
        resumed.resume(*whole.checkpoints.load(step))
        resumed.run()
        assert tensors_equal(weights_of(resumed), weights_of(whole)), step
        assert tensors_equal(resumed.cast.tensors("target"), whole.cast.tensors("target"))
        assert tensors_equal(resumed.cast.parked["early"], whole.cast.parked["early"])


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_of_a_run_with_a_head_can_be_exported(whole_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["export", str(whole_run), "--checkpoint", "2", "--output", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    recipe = Recipe.load(whole_run / "recipe.yaml")
    family = load_family(recipe.teacher)
    roles, stage = RunFolder(whole_run).roles_of("2", recipe, family)
    assert stage == 0
    assert {name: None if state.lora is None else state.lora.rank for name, state in roles.items()} == {
        "student": 2, "critic": None, "discriminator": None,
    }  # fmt: skip
    expected = finish.merged_network(family, roles["student"]).state_dict()
    exported = {step: UNet2DConditionModel.from_pretrained(folder / "pipeline" / "unet").state_dict()
                for step, folder in ((2, tmp_path / "out"), (4, whole_run))}  # fmt: skip
    assert tensors_equal(exported[2], expected)
    assert not tensors_equal(exported[2], exported[4])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("source", ["previous", "teacher"])
def test_a_head_goes_on_in_the_next_stage_or_starts_anew(sd_folder: str, tmp_path: Path, source: str) -> None:
    # Adam moves every weight by about the learning rate, so the second stage hardly moves away from its start.
    stages = [
        {
            "objective": {"name": "dmd2", **GAN}, "steps": 1, "batch_size": 2,
            "players": {"default": {"optimizer": {"lr": lr, "weight_decay": 0.0}}},
        }
        for lr in (1e-2, 1e-9)
    ]  # fmt: skip
    stages[1]["starts"] = {"discriminator": source}
    train(Recipe.from_mapping(gan_recipe(sd_folder, tmp_path / "run", stages=stages)))
    first, second = (RunFolder(tmp_path / "run").load_roles(i)["discriminator"].tensors for i in (0, 1))
    fresh = cast_with_head(load_family(sd_folder), size=16).state("discriminator").tensors
    expected = first if source == "previous" else fresh
    assert not tensors_equal(first, fresh)
    for name, tensor in expected.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_a_head_for_other_layers_cannot_go_on(sd_folder: str, tmp_path: Path) -> None:
    stages = [
        {"objective": {"name": "dmd2", **GAN, "layers": layers}, "steps": 1, "batch_size": 2}
        for layers in (["mid_block"], ["down_blocks.0", "mid_block"])
    ]
    with pytest.raises(UserError, match="start of role 'discriminator' does not fit"):
        train(Recipe.from_mapping(gan_recipe(sd_folder, tmp_path / "run", stages=stages)))


def test_an_objective_with_a_gan_asks_for_images_and_says_where(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"set data\.images"):
        trainer_of(sd, DMD2(**GAN)).run()
    with pytest.raises(UserError, match="gan_weight must not be negative"):
        DMD2(gan_weight=-1e-3)
    with pytest.raises(UserError, match="misaligned_weight must not be negative"):
        DMD2(misaligned_weight=-1.0)


def test_captions_of_cached_images_are_encoded_once(
    sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, family = Recipe.from_mapping(gan_recipe(sd_folder, tmp_path / "run")), load_family(sd_folder)
    objectives = [DMD2(**GAN)]
    batches = open_batches(recipe, objectives, family, RunFolder(tmp_path / "run"),
                           accelerator=Accelerator(cpu=True), display=Display(None))  # fmt: skip
    assert isinstance(batches.encode, EncodedTexts)
    assert len(batches.prompts) == 8, "more prompts than there are images"
    batch = batches.next("images", 5)
    assert sorted(batch.prompts) == list("abcde")
    expected = family.encode_prompts(batch.prompts).tensors["prompt_embeds"]
    torch.testing.assert_close(batch.condition.tensors["prompt_embeds"], expected)
    monkeypatch.setattr(family, "encode_prompts", None)
    batches.next("images", 5)


# ---- precision -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TwoLosses:
    """Two heads that learn in one phase, each from its own weights times a factor."""

    factors: Mapping[str, float]

    def roles(self) -> Mapping[str, Role]:
        def build(shapes: Any) -> nn.Module:
            return nn.Linear(1, 1, bias=False)

        return {"teacher": Frozen(), **{name: Head(build) for name in self.factors}}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("both", tuple(self.factors), self.loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> None:
        return None

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        return Loss({name: factor * cast.parameters(name)["weight"].sum() for name, factor in self.factors.items()})


@pytest.mark.parametrize(("factor", "moved", "scale"), [(2.0, 0.1, 8.0), (3e38, 0.0, 2.0)], ids=["fits", "overflows"])
def test_roles_of_one_phase_are_unscaled_by_one_scale(
    sd: ModelFamily, factor: float, moved: float, scale: float
) -> None:
    """A scaler that changes its scale at every update must do so behind the last role, not between two of them."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    sgd = {"optimizer": torch.optim.SGD, "options": {"lr": 0.1}, "clip": None}
    trainer = trainer_of(sd, TwoLosses({"first": factor, "second": 1.0}), accelerator=accelerator, player=sgd)
    with torch.no_grad():
        for name in ("first", "second"):
            trainer.cast.parameters(name)["weight"].fill_(0.1)
    trainer._iterate()
    after = {name: 0.1 - tensor.item() for name, tensor in weights_of(trainer).items()}
    # 4 times 3e38 is not finite: the phase is left out and the scale is halved
    assert after == pytest.approx({"first/weight": factor * moved, "second/weight": moved}, abs=1e-6)
    assert accelerator.scaler.get_scale() == scale


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """accelerate keeps one precision per process, so it has to be forgotten before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_several_steps_with_a_gan_train_every_weight_in_bfloat16(sd: ModelFamily, bf16: Accelerator) -> None:
    cached: list[bool] = []

    class Watching(DMD2):
        def student_loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
            cached.append(torch.is_autocast_cache_enabled())
            return super().student_loss(cast, batch, step)

    trainer = trainer_of(sd, Watching(timesteps=(999, 749, 499, 249), **GAN), accelerator=bf16, checkpointing=True)
    trainer.batches.latents = PaintedLatents()
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in after.values())
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []
    # torch 2.9 and older would give the student no gradient behind steps that ran without a graph
    assert cached == [False, False]
