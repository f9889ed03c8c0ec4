"""PixArt, FLUX and Sana, and what Stable Diffusion 3 and DiT share with them: images as of the stock pipelines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from stepdistill.adapters import LoraSettings, SharedNetwork
from stepdistill.data.cache import conditions_fingerprint
from stepdistill.data.latents import LatentBatch
from stepdistill.data.prompts import PromptSet
from stepdistill.data.sampler import StockSampler
from stepdistill.denoiser import AdapterWeights
from stepdistill.errors import UserError
from stepdistill.export.lora import export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.schedulers import family_scheduler
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.dit import DiT
from stepdistill.families.flux import Flux, packed, shift_exponent, unpacked
from stepdistill.families.pixart import PixArt
from stepdistill.families.sana import Sana
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.families.tiny_flux import tiny_flux
from stepdistill.families.tiny_pixart import tiny_pixart
from stepdistill.families.tiny_sana import tiny_sana
from stepdistill.finish import check, in_memory, merged_network
from stepdistill.objectives.base import InferenceSpec, Objective
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.sprint import Sprint
from stepdistill.sampling import ddim
from stepdistill.schedule import FlowSchedule, VPSchedule
from stepdistill.times import grid
from tests.tiny import scramble, trainer_of, weights_of


PROMPTS = ["red", "a ring"]
CLASSES = ["3", "7"]
FOUR = (999, 749, 499, 249)
TIMES = torch.tensor([0.3, 0.9], dtype=torch.float64)
NEW = ("pixart", "pixart_sigma", "flux", "sana")
SIZES = {"flux": 16}  # pixels; the others make images of their own size


@pytest.fixture
def load(request: pytest.FixtureRequest) -> Callable[[str], ModelFamily]:
    """Loads a tiny teacher by its family's name, at the size of these tests."""

    def loaded(name: str) -> ModelFamily:
        family = load_family(request.getfixturevalue(f"{name}_folder"))
        family.at_size(SIZES.get(name))
        if name == "dit":  # DiT's own table of noise levels is the linear one
            scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
            pipeline = DiTPipeline(family.pipeline.transformer, family.pipeline.vae, scheduler)
            pipeline.set_progress_bar_config(disable=True)
            return DiT(pipeline, family.path)
        return family

    return loaded


def noise_of(family: ModelFamily) -> Tensor:
    return torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(0))


def texts_of(family: ModelFamily) -> list[str]:
    return CLASSES if family.name == "dit" else PROMPTS


def stock_images(family: ModelFamily, pipeline: Any, **options: Any) -> Any:
    """What the stock pipeline makes of its own noise; it is the noise of `noise_of`."""
    options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0), **options}
    if family.name == "dit":
        return pipeline([int(c) for c in CLASSES], **{**options, "output_type": "np"}).images
    side = {"height": family.image_size, "width": family.image_size}
    return pipeline(PROMPTS, **side, **options).images


# ---- the same as the stock pipeline --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_the_network_is_called_as_the_stock_pipeline_calls_it(name: str, load: Callable[[str], ModelFamily]) -> None:
    family = load(name)
    given: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.append({**kwargs, **({"hidden_states": args[0]} if args else {})})

    family.network().register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        stock_images(family, family.pipeline, num_inference_steps=2, guidance_scale=2.0, output_type="latent")
        x = noise_of(family)
        t = torch.ones(2, dtype=torch.float64)
        family.denoiser().guided(x, t, family.encode_prompts(PROMPTS), family.null_condition(2), 2.0)
    stock, ours = given[0], given[-1]
    rows = 2 if name == "flux" else 4
    swapped = torch.arange(rows).roll(rows - 2)  # the stock pipelines put the half without a prompt first
    assert ours["encoder_hidden_states"].shape[:2] == (rows, {"pixart": 120, "flux": 512}.get(name, 300))
    for key in ("added_cond_kwargs", "return_dict"):
        assert ours.pop(key, None) == stock.pop(key, None)
    for key, value in ours.items():
        expected = stock[key] if key.endswith("_ids") else stock[key][swapped]
        # Sana's stock scheduler rounds its first timestep down from 1000.
        torch.testing.assert_close(value, expected.to(value), rtol=0, atol=1.01 if key == "timestep" else 0, msg=key)


@pytest.mark.parametrize("name", [*NEW, "sd3", "dit"])
def test_our_denoiser_makes_the_stock_pipelines_images(name: str, load: Callable[[str], ModelFamily]) -> None:
    family = load(name)
    images = torch.as_tensor(stock_images(family, family.pipeline, num_inference_steps=4, guidance_scale=2.0))
    images = images.permute(0, 3, 1, 2) if name == "dit" else images
    sampler = StockSampler(family.denoiser(), {}, name=family.pipeline.scheduler, steps=4, guidance=2.0)
    made = sampler(noise_of(family), family.encode_prompts(texts_of(family)), family.null_condition(2))
    with torch.no_grad():
        found = family.decode_latents(made.sample)
    assert found.std() > 0.05, "images of one colour would agree whatever made them"
    assert (found[0] - found[1]).abs().max() > 0.01, "prompts that do nothing test nothing"
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_fluxs_own_steps_are_ours_without_any_scheduler(dynamic: bool) -> None:
    pipeline = tiny_flux(guidance_embeds=dynamic)
    pipeline.set_progress_bar_config(disable=True)
    family = Flux(pipeline, "tiny")
    family.at_size(24)
    images = stock_images(family, pipeline, num_inference_steps=4, guidance_scale=3.5)
    condition, null = family.encode_prompts(PROMPTS), family.null_condition(2)
    times = grid(family.schedule, FOUR, torch.device("cpu"))
    with torch.no_grad():
        # FLUX.1-schnell is told no scale, and its pipeline ignores the one that it is given.
        scale = 3.5 if dynamic else 1.0
        made = ddim(family.denoiser(), noise_of(family), times, condition, null=null, guidance=scale)
        torch.testing.assert_close(family.decode_latents(made), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("pixart", "epsilon"), ("flux", "flow"), ("sana", "flow")])
def test_a_folder_is_loaded_with_its_schedule(name: str, kind: str, load: Callable[[str], ModelFamily]) -> None:
    family = load(name)
    assert (family.name, family.kind, type(family.pipeline).__name__) == (name, kind, family.pipeline_class)
    assert family.network() is family.pipeline.transformer
    if name == "pixart":
        assert isinstance(family.schedule, VPSchedule)
        stock = family.pipeline.scheduler.alphas_cumprod[[0, 500, 999]].double()
        t = family.schedule.t_from_model_time(torch.tensor([0.0, 500.0, 999.0]))
        torch.testing.assert_close(family.schedule.alpha(t).square(), stock, rtol=1e-4, atol=1e-6)
    if name == "sana":
        assert isinstance(family.schedule, FlowSchedule)
        assert family.schedule.shift == 3.0
        assert family.latent_shape() == (4, 16, 16)
        assert family.image_size == 512


@pytest.mark.parametrize("name", [*NEW, "sd3", "dit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_feature_layers_give_the_images_tokens(
    name: str, checkpointing: bool, load: Callable[[str], ModelFamily]
) -> None:
    family = load(name)
    if checkpointing:
        family.network().enable_gradient_checkpointing()  # type: ignore[operator]
    x, condition = noise_of(family).requires_grad_(), family.encode_prompts(texts_of(family))
    (feature,) = family.denoiser().features(x, TIMES, condition, family.feature_layers)
    patch = 2 if name == "flux" else int(family.network_config.patch_size)
    width = 24 if name.startswith("pixart") else 16
    assert feature.shape == (2, (x.shape[-1] // patch) ** 2, width)
    feature[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().max() > 0
    assert not x.grad[1].any(), "a sample's features know of no other sample"


# ---- what is particular --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pixart_at_1024_pixels_is_told_the_size_as_its_pipeline_tells_it() -> None:
    pipeline = tiny_pixart(side=128)
    pipeline.set_progress_bar_config(disable=True)
    family = PixArt(pipeline, "tiny")
    given: list[dict[str, Any]] = []
    outputs: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        given.append(kwargs["added_cond_kwargs"])
        outputs.append(output[0])

    family.network().register_forward_hook(note, with_kwargs=True)
    x = noise_of(family)
    stock_images(family, pipeline, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    condition = family.encode_prompts(PROMPTS)
    said = family.denoiser()(x, torch.ones(2, dtype=torch.float64), condition).native
    assert given[-1]["resolution"].tolist() == [[1024.0, 1024.0]] * 2
    for key in ("resolution", "aspect_ratio"):
        assert torch.equal(given[0][key], given[-1][key]), key
    torch.testing.assert_close(outputs[0], outputs[-1], rtol=0, atol=1e-5)
    assert torch.equal(said, outputs[-1][:, :4]), "the other half is the learnt variance"
    family.denoiser()(x[..., :64, :], torch.ones(2, dtype=torch.float64), condition)
    assert given[-1]["aspect_ratio"].tolist() == [[0.5]] * 2


@torch.no_grad()
def test_flux_is_told_its_guidance_in_one_call(load: Callable[[str], ModelFamily]) -> None:
    flux = load("flux")
    rows: list[int] = []
    flux.network().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    x, condition, null, view = noise_of(flux), flux.encode_prompts(PROMPTS), flux.null_condition(2), flux.denoiser()
    plain, one, three = view(x, TIMES, condition), *(view.guided(x, TIMES, condition, null, s) for s in (1.0, 3.0))
    assert rows == [2, 2, 2]
    assert torch.equal(plain.native, one.native), "where nobody names a scale it is 1"
    assert (three.native - one.native).abs().max() > 1e-4
    each = view.guided(x, TIMES, condition, null, torch.tensor([1.0, 3.0])).native
    torch.testing.assert_close(each, torch.stack([one.native[0], three.native[1]]), rtol=1e-4, atol=1e-5)


def test_fluxs_shift_follows_from_the_size_of_the_images(load: Callable[[str], ModelFamily]) -> None:
    flux = load("flux")
    published = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    assert math.exp(shift_exponent(published, 4096)) == pytest.approx(3.158, abs=1e-3)
    seen = []
    for size in (16, 64, 256):
        flux.at_size(size)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(flux.pipeline.scheduler.config)
        tokens = (size // 4) ** 2
        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=shift_exponent(scheduler.config, tokens))
        ours = flux.schedule.sigma(grid(flux.schedule, FOUR, torch.device("cpu")))
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), ours, rtol=0, atol=1e-6)
        assert flux.latent_shape() == (4, size // 2, size // 2)
        seen.append(flux.schedule.shift)  # type: ignore[attr-defined]
    assert seen[0] < seen[1] < seen[2]
    with pytest.raises(UserError, match=r"data\.size: 18 pixels .* take 16"):
        flux.at_size(18)


def test_latents_are_packed_as_the_stock_pipeline_packs_them() -> None:
    x = torch.randn(2, 4, 6, 8)
    pipeline: Any = diffusers.FluxPipeline
    assert torch.equal(packed(x), pipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpacked(packed(x), 3, 4), x)


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_a_flux_students_schedule_is_what_its_pipeline_visits(
    sampler: Any, load: Callable[[str], ModelFamily]
) -> None:
    flux = load("flux")
    scheduler: Any = family_scheduler(flux, InferenceSpec(FOUR, sampler))
    flux.pipeline.register_modules(scheduler=scheduler)
    told: list[float] = []
    flux.network().register_forward_pre_hook(
        lambda module, args, kwargs: told.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    stock_images(flux, flux.pipeline, num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    assert told == pytest.approx(flux.schedule.sigma(grid(flux.schedule, FOUR, torch.device("cpu"))).tolist())
    with pytest.raises(UserError, match=r"no stock .* for example \[999, 499\]"):
        family_scheduler(flux, InferenceSpec((999, 799), sampler))


def sana_answers(network: nn.Module, sana: ModelFamily, dtype: torch.dtype | None) -> Tensor:
    """Under autocast, where a type is given."""
    x = torch.randn(1, *sana.latent_shape(), generator=torch.Generator().manual_seed(0))
    condition, time = sana.encode_prompts(["a"]), torch.tensor([500.0])
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return sana.forward(network, x, time, condition).float()


def test_sanas_linear_attention_is_summed_in_full_under_autocast(load: Callable[[str], ModelFamily]) -> None:
    sana = load("sana")
    stock = type(sana.network()).from_config(sana.network_config).eval()
    stock.load_state_dict(sana.network().state_dict())
    copy = sana.plain_network()
    copy.load_state_dict(sana.network().state_dict())
    assert torch.equal(sana_answers(copy, sana, None), sana_answers(stock, sana, None)), "the same without autocast"
    networks = (sana.network(), copy, stock)
    for network in networks:
        for block in network.transformer_blocks:  # scales of the size that many tokens add up to
            with torch.no_grad():
                block.attn1.to_k.weight.mul_(300)
                block.attn1.to_v.weight.mul_(300)
                block.attn1.to_out[0].weight.div_(300)
    exact = sana_answers(stock, sana, None)
    assert not sana_answers(stock, sana, torch.float16).isfinite().all(), "what is to be kept from happening"
    for network in networks[:2]:
        error = (sana_answers(network, sana, torch.float16) - exact).square().mean() / exact.square().mean()
        assert error.sqrt() < 0.01


def test_sanas_prompts_come_behind_the_instruction_and_its_negative_ones_do_not(
    load: Callable[[str], ModelFamily],
) -> None:
    sana = load("sana")
    empty, null = sana.encode_prompts([""]).tensors, sana.null_condition(3).tensors
    assert null["prompt_embeds"].shape == (3, 300, 24)
    assert null["prompt_attention_mask"].sum() < empty["prompt_attention_mask"].sum()
    assert (null["prompt_embeds"][0] - empty["prompt_embeds"][0]).abs().max() > 0.1
    before = conditions_fingerprint(sana, PromptSet(tuple(PROMPTS)))

    class Terse(Sana):
        @property
        def _instruction(self) -> list[str]:
            return ["Draw: "]

    terse = Terse(sana.pipeline, sana.path)
    assert conditions_fingerprint(terse, PromptSet(tuple(PROMPTS))) != before


@torch.no_grad()
def test_sana_has_no_posterior_and_scales_times_as_its_configuration_says(
    load: Callable[[str], ModelFamily],
) -> None:
    sana = load("sana")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = sana.pipeline.vae.encode(images).latent * 0.41407
    assert torch.equal(sana.encode_images(images), expected)
    mean, std = sana.image_moments(images)
    assert torch.equal(mean, expected)
    assert not std.any()
    scaled, given = Sana(tiny_sana(timestep_scale=0.001), "tiny"), []
    scaled.network().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["timestep"]), with_kwargs=True
    )
    scaled.denoiser()(noise_of(scaled), torch.ones(2, dtype=torch.float64), scaled.null_condition(2))
    torch.testing.assert_close(given[0], torch.ones(2))


@torch.no_grad()
def test_stable_diffusion_3_works_without_t5(sd3_folder: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd3_folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    family = StableDiffusion3(pipeline, sd3_folder)
    assert set(family.text_modules()) == {"text_encoder", "text_encoder_2"}
    assert len(conditions_fingerprint(family, PromptSet(tuple(PROMPTS)))) == 64
    images = stock_images(family, pipeline, num_inference_steps=2, guidance_scale=2.0)
    sampler = StockSampler(family.denoiser(), {}, name=pipeline.scheduler, steps=2, guidance=2.0)
    made = sampler(noise_of(family), family.encode_prompts(PROMPTS), family.null_condition(2))
    torch.testing.assert_close(family.decode_latents(made.sample), images, rtol=0, atol=1e-4)


def test_a_shift_by_size_is_refused_where_it_is_not_known(sd3_folder: str) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(sd3_folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="supported for FLUX alone"):
        StableDiffusion3(pipeline, sd3_folder)


# ---- students ------------------------------------------------------------------------------------------------------


class Pictures:
    """An images stream without images."""

    def __init__(self, family: ModelFamily) -> None:
        self._family = family

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        generator = torch.Generator().manual_seed(1000 * seed + start)
        texts = [texts_of(self._family)[number % 2] for number in range(start, start + count)]
        return LatentBatch(torch.randn(count, *self._family.latent_shape(), generator=generator), texts)


def exported(family: ModelFamily, objective: Objective, weights: str, folder: Path) -> tuple[Any, InferenceSpec]:
    """A step of training, then larger changes than one makes => the student's plain network; its export is written."""
    roles = {"student": LoraSettings(2, 4.0, family.lora_targets)} if weights == "lora" else {}
    trainer = trainer_of(family, objective, lora=roles, steps=1, checkpointing=True, texts=texts_of(family))
    trainer.batches.latents = Pictures(family)
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    changed = [name for name in after if name.startswith("student/") and not torch.equal(before[name], after[name])]
    # The B matrix of an adapter alone moves in its first step.
    assert len(changed) >= (0.4 if weights == "lora" else 0.8) * sum(n.startswith("student/") for n in after)
    if weights == "lora":
        scramble({n: p for n, p in trainer.cast.parameters("student").items() if "lora_B" in n})
    state = trainer.cast.state("student")
    trainer.cast.release()
    network, spec = merged_network(family, state), objective.inference()
    assert spec is not None
    difference = max(
        float((new - old).abs().max())
        for new, old in zip(network.parameters(), family.network().parameters(), strict=True)
    )
    assert difference > 1e-4, "the teacher itself would pass"
    export_pipeline(family, network, spec, folder, facts={"method": "test"})
    return network, spec


@pytest.mark.parametrize(
    ("name", "objective", "weights"),
    [
        ("pixart", DMD2(FOUR, critic_updates=1, gan_weight=1e-3), "lora"),
        ("pixart_sigma", DMD2(critic_updates=1), "full"),
        ("flux", DMD2(FOUR, guidance=3.5, critic_updates=1, gan_weight=1e-3), "lora"),
        ("flux", DMD2((999, 499), guidance=3.5, critic_updates=1), "full"),
        ("sana", Sprint(timesteps=(999, 499), warmup_steps=1), "lora"),
        ("sd3", DMD2(FOUR, critic_updates=1, gan_weight=1e-3), "lora"),
        ("dit", DMD2(FOUR, critic_updates=1, gan_weight=1e-3), "full"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_a_student_takes_a_step_and_its_folder_makes_its_images(
    name: str, objective: Objective, weights: str, load: Callable[[str], ModelFamily], tmp_path: Path
) -> None:
    family = load(name)
    network, spec = exported(family, objective, weights, tmp_path / "student")
    with torch.no_grad():
        expected = in_memory(family, network, spec, noise_of(family), texts_of(family))
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    assert type(stock).__name__ == family.pipeline_class
    torch.manual_seed(0)  # flow schedulers and DiT's pipeline draw the noise between steps from torch's own
    generator = torch.Generator().manual_seed(0)
    own_noise = {} if name == "dit" else {"latents": family.pipeline_latents(noise_of(family))}
    images = stock_images(
        family, stock, num_inference_steps=spec.num_steps, guidance_scale=1.0, generator=generator, **own_noise
    )
    images = torch.as_tensor(images).permute(0, 3, 1, 2) if name == "dit" else images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    facts = json.loads((tmp_path / "student" / "distillation_config.json").read_text())
    assert (facts["pipeline"], facts["steps"]) == (family.pipeline_class, spec.num_steps)
    if isinstance(family.schedule, FlowSchedule):
        sigmas = family.schedule.sigma(grid(family.schedule, spec.timesteps, torch.device("cpu")))
        assert facts["sigmas"] == pytest.approx(sigmas.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_fresh_process_is_asked_for_images_of_the_students_size(
    name: str, load: Callable[[str], ModelFamily], tmp_path: Path
) -> None:
    family, spec = load(name), InferenceSpec((999, 499))
    network = family.plain_network()
    network.load_state_dict(family.network().state_dict())
    scramble({"proj_out": network.get_parameter("proj_out.weight")})
    folder = export_pipeline(family, network, spec, tmp_path / "student", facts={})
    assert check(family, network, spec, folder, None) <= 1e-4


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_an_adapter_acts_on_every_kind_of_layer_and_loads_in_the_stock_pipeline(
    name: str, load: Callable[[str], ModelFamily], tmp_path: Path
) -> None:
    family, spec = load(name), InferenceSpec((999, 499))
    shared = SharedNetwork(family.network())
    shared.add("student", LoraSettings(2, 6.0, family.lora_targets))
    state = shared.parameters("student")
    for target in family.lora_targets:
        assert any(f"{target}.lora_A" in key for key in state), target
    scramble(state, scale=0.1)
    x, condition = noise_of(family), family.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = family.denoiser(AdapterWeights(shared, "student"))(x, TIMES, condition).native
        plain = family.denoiser(AdapterWeights(shared, None))(x, TIMES, condition).native
    assert (expected - plain).abs().max() > 1e-2
    tensors = {key: p.detach() for key, p in state.items()}
    folder = export_lora(family, tensors, rank=2, alpha=6.0, folder=tmp_path / "lora", spec=spec)
    stock = load_family(family.path)
    stock.at_size(family.image_size)
    stock.pipeline.load_lora_weights(folder)
    with torch.no_grad():
        loaded = stock.denoiser()(x, TIMES, condition).native
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_lora_loader_is_exported_merged(load: Callable[[str], ModelFamily], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PixArtAlphaPipeline cannot load LoRA .* holds the merged weights"):
        export_lora(load("pixart"), {}, rank=2, alpha=2.0, folder=tmp_path / "lora")
