"""Options that save memory or time change no result, alone or together, and say so where they cannot work."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.recipe import Recipe, optimizer_class
from stepdistill.resources import apply
from stepdistill.resources.apply import check_options, loading_types, prepare_cast, prepare_teacher, settings_of
from stepdistill.resources.attention import check_kernels, chosen_attention, kernels_of, probe, usable_xformers
from stepdistill.resources.config import MemoryConfig
from stepdistill.resources.offload import offload_states
from stepdistill.resources.plan import plan
from stepdistill.run import _Run, train
from stepdistill.trainer import Trainer
from tests.tiny import LORA, PaintedLatents, tiny_recipe, trainer_of, weights_of


def recipe_of(folder: str, tmp_path: Path, **changes: Any) -> Recipe:
    return Recipe.from_mapping(tiny_recipe(folder, tmp_path / "run", **changes))


def played(folder: str, tmp_path: Path, *, lora: bool, checkpointing: bool = False, **changes: Any) -> Trainer:
    """Two iterations of DMD2 with its GAN under options."""
    torch._dynamo.reset()
    recipe = recipe_of(folder, tmp_path, **changes)
    family = load_family(folder, dtype=loading_types(recipe.memory))
    prepare_teacher(family, recipe.memory)
    objective = DMD2(guidance=2.0, critic_updates=1, gan_weight=1e-2)
    adapters = {"student": LORA, "critic": LORA} if lora else {}
    # SGD, since Adam makes differences of rounding as large as a step.
    player = {"optimizer": torch.optim.SGD, "options": {"lr": 1e-2, "momentum": 0.9}}
    trainer = trainer_of(family, objective, lora=adapters, checkpointing=checkpointing, player=player)
    trainer.batches.latents = PaintedLatents()
    prepare_cast(trainer.cast, recipe)
    if recipe.memory.offload_optimizer:
        for each in trainer.players.values():
            offload_states(each.optimizer)
    with settings_of(recipe):
        trainer.run()
    return trainer


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


class TestTogether:
    @pytest.mark.slow
    @pytest.mark.parametrize("compiled", [False, "aot_eager"], ids=["python", "compiled"])
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_all_options_that_keep_the_arithmetic_keep_the_weights(
        self, sd_folder: str, tmp_path: Path, lora: bool, compiled: bool | str
    ) -> None:
        plain = weights_of(played(sd_folder, tmp_path, lora=lora))
        start = weights_of(trainer_of(load_family(sd_folder), DMD2(gan_weight=1e-2),
                                      lora={"student": LORA, "critic": LORA} if lora else {}))  # fmt: skip
        assert any(not torch.equal(plain[name], start[name]) for name in plain), "nothing was trained"
        memory = {"compile": compiled, "channels_last": True, "tf32": True, "offload_optimizer": True,
                  "vae_slicing": True, "vae_tiling": True, "park_encoders": True}  # fmt: skip
        spared = played(sd_folder, tmp_path, lora=lora, checkpointing=True, memory=memory, attention="sdpa")
        assert_equal(weights_of(spared), plain)

    @pytest.mark.slow
    @pytest.mark.parametrize("option", ["compile", "channels_last"])
    def test_transformers_train_the_same(self, sd3_folder: str, tmp_path: Path, option: str) -> None:
        plain = weights_of(played(sd3_folder, tmp_path, lora=True))
        value = "aot_eager" if option == "compile" else True
        spared = played(sd3_folder, tmp_path, lora=True, checkpointing=True, memory={option: value})
        assert_equal(weights_of(spared), plain)


class TestCompile:
    @pytest.mark.slow
    def test_adapters_of_compiled_blocks_are_told_apart(self, sd_folder: str, tmp_path: Path) -> None:
        trainer = played(sd_folder, tmp_path, lora=True, memory={"compile": "aot_eager"})
        network = trainer.cast.family.network()
        assert any(m._compiled_call_impl is not None for m in network.modules()), "nothing was compiled"
        batch = trainer.batches.next("prompts", 2)
        x, t = torch.ones(2, *batch.latent_shape), torch.full((2,), 0.5, dtype=torch.float64)
        for role in ("teacher", "student", "critic", "teacher"):
            compiled = trainer.cast.denoiser(role)(x, t, batch.condition).native
            with torch.compiler.set_stance("force_eager"):
                plain = trainer.cast.denoiser(role)(x, t, batch.condition).native
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
        views = [trainer.cast.denoiser(role) for role in ("teacher", "student", "critic")]
        outputs = [view(x, t, batch.condition).native for view in views]
        assert all(not torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))

    @pytest.mark.slow
    def test_layers_that_are_looked_at_are_not_compiled_away(self, sd3_folder: str, tmp_path: Path) -> None:
        trainer = played(sd3_folder, tmp_path, lora=True, memory={"compile": "aot_eager"})
        batch = trainer.batches.next("prompts", 2)
        x, t = torch.ones(2, *batch.latent_shape), torch.full((2,), 0.5, dtype=torch.float64)
        found = trainer.cast.denoiser("critic").features(x, t, batch.condition, ("transformer_blocks.0.attn",))
        assert found[0].shape[0] == 2


@pytest.fixture
def new_precision() -> Iterator[None]:
    """accelerate keeps one precision per process, so it has to be forgotten before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class TestBase:
    @pytest.mark.usefixtures("new_precision")
    def test_a_half_precision_base_trains_adapters_in_float32(self, sd_folder: str, tmp_path: Path) -> None:
        recipe = recipe_of(sd_folder, tmp_path, memory={"base": "bf16"}, precision="bf16",
                           previews={"every": 6, "prompts": 3}, export={"pipeline": True, "lora": True})  # fmt: skip
        result = train(recipe)
        assert [file.name for file in (tmp_path / "run" / "previews").iterdir()] == ["step-0000006.png"]
        assert result.pipeline is not None
        exported = StableDiffusionPipeline.from_pretrained(result.pipeline)
        base = load_family(sd_folder).network().state_dict()
        changed = [k for k, v in exported.unet.state_dict().items() if not torch.equal(v, base[k])]
        assert changed, "the student is the teacher"
        assert all("to_" in k or "conv" in k or "ff" in k or "proj" in k for k in changed)

    def test_networks_with_weights_of_their_own_are_float32_on_a_half_precision_base(self, sd_folder: str) -> None:
        family = load_family(sd_folder, dtype=loading_types(MemoryConfig(base="bf16")))
        assert family.pipeline.vae.dtype == torch.float32
        assert family.network().dtype == torch.bfloat16
        trainer = trainer_of(family, DMD2(), lora={"critic": LORA})
        for role in ("student", "critic"):
            assert {p.dtype for p in trainer.cast.parameters(role).values()} == {torch.float32}

    def test_a_base_that_needs_a_package_names_the_extra(self, sd_folder: str, tmp_path: Path) -> None:
        from importlib.util import find_spec

        for base, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
            if find_spec(package) is None:
                with pytest.raises(UserError, match=rf"pip install 'stepdistill\[{package}\]'"):
                    check_options(recipe_of(sd_folder, tmp_path, memory={"base": base}, precision="bf16"))

    @pytest.mark.parametrize("base", ["bf16", "fp16", "int8", "nf4"])
    def test_a_half_precision_base_is_refused_where_everything_is_computed_in_float32(
        self, sd_folder: str, tmp_path: Path, base: str
    ) -> None:
        recipe = recipe_of(sd_folder, tmp_path, memory={"base": base})
        for check in (check_options, plan):
            with pytest.raises(UserError, match=r"memory\.base: .* use precision: bf16"):
                check(recipe)

    def test_what_is_parked_never_goes_to_the_device(self, sd_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(apply, "_park", lambda component, device: seen.append((component, device)))
        family = load_family(sd_folder)
        prepare_teacher(family, MemoryConfig(park_encoders=True), "meta")  # whence no tensor comes back
        assert {p.device.type for p in family.network().parameters()} == {"meta"}
        parts = [family.pipeline.components[name] for name in ("vae", "text_encoder")]
        assert [device for _, device in seen] == ["meta"] * len(parts)
        assert {id(component) for component, _ in seen} == {id(part) for part in parts}
        assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}

    def test_a_network_is_quantised_before_it_is_on_the_device(
        self, sd_folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        monkeypatch.setattr(
            apply, "quantise", lambda network, base, device: seen.append((network.device.type, device))
        )
        family = load_family(sd_folder)
        prepare_teacher(family, MemoryConfig(base="nf4"), "meta")
        assert seen == [("cpu", "meta")]
        assert family.device.type == "meta"

    def test_an_export_after_saving_memory_is_made_on_the_host(self, sd_folder: str, tmp_path: Path) -> None:
        run = object.__new__(_Run)
        run.recipe = recipe_of(sd_folder, tmp_path, memory={"park_encoders": True})
        run.batches, run.family = None, load_family(sd_folder)
        run.family.network().to("meta")
        run._load_plainly()
        assert run.family.device.type == "cpu"

    def test_after_a_stage_the_network_is_what_it_was(self, sd_folder: str) -> None:
        family = load_family(sd_folder)
        before, kind = family.network().state_dict(), [type(m) for m in family.network().modules()]
        trainer = trainer_of(family, DMD2(), lora={"student": LORA, "critic": LORA}, checkpointing=True)
        trainer.run()
        trainer.cast.release()
        network = family.network()
        assert [type(m) for m in network.modules()] == kind
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
        assert not network.is_gradient_checkpointing


class TestOffload:
    def test_states_are_elsewhere_between_steps_and_updates_are_the_same_bits(self) -> None:
        results = []
        for offloaded in (False, True):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(8, 8))
            optimizer = torch.optim.AdamW([weight], lr=1e-2)
            if offloaded:
                offload_states(optimizer)
            for _ in range(3):
                weight.grad = torch.randn(8, 8)
                optimizer.step()
            results.append(weight.detach().clone())
        assert torch.equal(*results)

    def test_states_wait_on_the_other_device(self) -> None:
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([weight])
        offload_states(optimizer, device="meta")  # any other device than the parameters'
        weight.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].device.type == "meta"
        assert optimizer.state[weight]["step"].device.type == "cpu"


class TestOptimizer:
    def test_a_missing_package_is_named_with_its_extra(self) -> None:
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is not None:
            pytest.skip("bitsandbytes is installed")
        from stepdistill.recipe_sections import OptimizerConfig

        with pytest.raises(UserError, match=r"pip install 'stepdistill\[bitsandbytes\]'"):
            optimizer_class(OptimizerConfig(name="bitsandbytes.optim.PagedAdamW8bit"), "players.student.optimizer")


class TestAttention:
    @staticmethod
    def attend(mask: Tensor | None = None) -> Callable[[], Tensor]:
        x = torch.randn(1, 2, 16, 8)
        return lambda: scaled_dot_product_attention(x, x, x, attn_mask=mask)

    def test_what_ran_is_what_was_chosen(self) -> None:
        assert probe(self.attend(), "math", "it").keys() == {"math"}
        assert probe(self.attend(), "flash", "it").keys() == {"flash"}

    def test_attention_that_is_written_out_is_seen(self) -> None:
        x = torch.randn(2, 16, 8)
        seen = kernels_of(lambda: (x @ x.mT).softmax(-1) @ x)
        assert seen == {"plain": 1}
        with pytest.raises(UserError, match="plain 1 times"):
            check_kernels(seen, "sdpa", "it")

    def test_operators_of_xformers_are_seen(self) -> None:
        library = torch.library.Library("xformers_flash0", "DEF")  # the real one's name ends without a number
        library.define("flash_fwd(Tensor x) -> Tensor")
        library.impl("flash_fwd", lambda x: x.clone(), "CPU")
        seen = probe(lambda: torch.ops.xformers_flash0.flash_fwd(torch.ones(2)), "xformers", "it")
        assert seen == {"xformers": 1}

    @pytest.mark.parametrize(
        ("events", "expected"),
        [
            ({"aten::_efficient_attention_forward": 3}, {"xformers": 3}),
            ({"xformers_flash3::flash_fwd": 2, "aten::_flash_attention_forward": 2}, {"xformers": 2}),
            ({"xformers_flash::flash_bwd": 2}, {}),
            ({"aten::_scaled_dot_product_efficient_attention": 3, "aten::_efficient_attention_forward": 3},
             {"efficient": 3}),
            ({"aten::_scaled_dot_product_flash_attention": 1, "aten::_flash_attention_forward": 2},
             {"flash": 1, "xformers": 1}),
        ],
    )  # fmt: skip
    def test_torchs_kernels_are_those_of_xformers_where_torch_itself_did_not_call_them(
        self, events: dict[str, int], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told = [SimpleNamespace(key=key, count=count) for key, count in events.items()]
        seen = SimpleNamespace(key_averages=lambda: told)
        monkeypatch.setattr("stepdistill.resources.attention.profile", lambda **_: nullcontext(seen))
        assert kernels_of(lambda: None) == expected

    def test_a_kernel_that_is_not_there_is_a_mistake_and_no_silence(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has the kernel")
        with pytest.raises(UserError, match="efficient cannot compute it on this device"):
            probe(self.attend(), "efficient", "it")

    def test_what_the_kernel_cannot_compute_goes_to_others_in_training(self, sd_folder: str, tmp_path: Path) -> None:
        mask = torch.zeros(1, 2, 16, 16, requires_grad=True)  # flash takes no mask with a gradient
        with pytest.raises(RuntimeError), chosen_attention("flash"):
            self.attend(mask)()
        with settings_of(recipe_of(sd_folder, tmp_path, attention="flash")):
            assert kernels_of(self.attend(mask)) == {"math": 1}
            assert kernels_of(self.attend()) == {"flash": 1}

    def test_a_pass_without_attention_is_no_success(self) -> None:
        with pytest.raises(UserError, match="came by no attention kernel"):
            probe(lambda: torch.ones(2) + 1, "flash", "it")

    @pytest.mark.parametrize("teacher", ["sd_folder", "dit_folder", "sd3_folder"])
    @pytest.mark.parametrize("choice", ["math", "flash"])
    def test_the_recipe_key_decides_what_networks_run(
        self, teacher: str, choice: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        folder = request.getfixturevalue(teacher)
        recipe = recipe_of(folder, tmp_path, attention=choice)
        trainer = trainer_of(load_family(folder), DMD2(), lora={})
        assert prepare_cast(trainer.cast, recipe).keys() == {choice}

    def test_xformers_that_is_broken_gives_one_warning_and_torch_attention(self) -> None:
        def attempt() -> None:
            raise RuntimeError("built for another torch")

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert not usable_xformers("cpu", attempt)
        assert len(told) == 1
        assert "built for another torch" in str(told[0].message)

    def test_the_doctor_says_what_ran(self, sd_folder: str, tmp_path: Path) -> None:
        import yaml

        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(tiny_recipe(sd_folder, tmp_path / "run", attention="math")))
        result = CliRunner().invoke(app, ["doctor", str(file), "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert "attention: flash: flash ran" in result.output
        assert "UNet2DConditionModel, attention: math: math" in result.output


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_a_choice_for_convolutions_too_and_ends_with_the_training(
    allowed: bool, sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    with settings_of(recipe_of(sd_folder, tmp_path, memory={"tf32": allowed})):
        assert torch.backends.cudnn.allow_tf32 == allowed
    assert torch.backends.cudnn.allow_tf32 == (not allowed)


def test_options_that_say_nothing_leave_a_recipe_its_fingerprint(sd_folder: str, tmp_path: Path) -> None:
    plain = recipe_of(sd_folder, tmp_path)
    said = recipe_of(sd_folder, tmp_path, memory={"base": "fp32"}, attention="auto")
    assert said.sha256 == plain.sha256
    assert recipe_of(sd_folder, tmp_path, memory={"base": "bf16"}).sha256 != plain.sha256
    assert recipe_of(sd_folder, tmp_path, attention="math").sha256 != plain.sha256
