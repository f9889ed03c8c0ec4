"""Exports of tiny random pipelines of the real classes; what plain Diffusers makes of them, against sums by hand."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepdistill import finish
from stepdistill.cast import RoleState
from stepdistill.console import Display
from stepdistill.errors import UserError
from stepdistill.export import verify
from stepdistill.export.card import markdown_table, write_card
from stepdistill.export.lora import difference_lora, export_lora, fold_alpha
from stepdistill.export.pipeline import atomic_folder, export_pipeline
from stepdistill.export.schedulers import student_scheduler
from stepdistill.export.verify import ExportMismatchError, ImageRequest, verify_export
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.finish import export_student
from stepdistill.objectives.base import InferenceSpec
from stepdistill.recipe import Recipe
from stepdistill.run_folder import RunFolder
from tests.tiny import tiny_recipe


FACTS = {"method": "vsd", "recipe_sha256": "abc"}
PROMPTS = ["red", "a ring"]
LABELS = [3, 7]
ONE, FOUR = InferenceSpec((999,)), InferenceSpec((999, 749, 499, 249))
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"]


# ---- tiny pipelines ----------------------------------------------------------------------------------------------


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
    )  # fmt: skip


def tiny_sd(folder: Path) -> str:
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8)
    text_config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    # clip_sample and thresholding stand for a teacher's sampler options, which a student must not inherit.
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def tiny_dit(folder: Path) -> str:
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer, tiny_vae(), DDPMScheduler(**BETAS))
    pipeline.register_to_config(id2label={"3": "red, crimson", "7": "ring"})
    pipeline.save_pretrained(folder)
    return str(folder)


def student_of(family: ModelFamily) -> nn.Module:
    """A student that differs from the teacher everywhere."""
    student = copy.deepcopy(family.network())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


# ---- the same by hand ----------------------------------------------------------------------------------------------


def noise_levels(t: int) -> tuple[float, float]:
    """alpha and sigma of the scaled linear table, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = float(torch.cumprod(1 - betas, 0)[t])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def call(family: ModelFamily, network: nn.Module, x: Tensor, t: int) -> Tensor:
    if family.name == "dit":
        return network(x, timestep=torch.tensor([t, t]), class_labels=torch.tensor(LABELS)).sample[:, :4]
    tokens = family.pipeline.tokenizer(PROMPTS, padding="max_length", max_length=8, return_tensors="pt")
    embeds = family.pipeline.text_encoder(tokens.input_ids)[0]
    return network(x, t, encoder_hidden_states=embeds).sample


@torch.no_grad()
def sample_by_hand(
    family: ModelFamily, network: nn.Module, timesteps: tuple[int, ...], seed: int, latents: Tensor | None
) -> Tensor:
    """Predict the clean latent, add fresh noise, repeat; all noise from the generators that the pipeline uses."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=generator) if latents is None else latents
    if family.name == "dit":
        generator.manual_seed(seed + 1)
    network.eval()
    for index, t in enumerate(timesteps):
        alpha, sigma = noise_levels(t)
        x0 = (x - sigma * call(family, network, x, t)) / alpha
        if index + 1 < len(timesteps):
            alpha, sigma = noise_levels(timesteps[index + 1])
            x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
    images = family.pipeline.vae.decode(x0 / 0.5).sample
    return (images / 2 + 0.5).clamp(0, 1)


# ---- exports, made once, and what a fresh process makes of all of them ---------------------------------------------

PLAIN_DIFFUSERS = """
import json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
root = sys.argv[1]
latents = load_file(f"{root}/latents.safetensors")["latents"]
images = {}
for name, steps in (("sd1", 1), ("sd4", 4)):
    pipe = DiffusionPipeline.from_pretrained(f"{root}/{name}")
    out = pipe(["red", "a ring"], num_inference_steps=steps, guidance_scale=1, latents=latents, output_type="np",
               generator=torch.Generator("cpu").manual_seed(11))
    images[name] = torch.from_numpy(out.images).contiguous()
for name, steps in (("dit1", 1), ("dit4", 4)):
    pipe = DiffusionPipeline.from_pretrained(f"{root}/{name}")
    labels = pipe.get_label_ids(["crimson", "ring"])
    torch.manual_seed(12)  # DiTPipeline gives its generator to the starting noise alone
    out = pipe(labels, num_inference_steps=steps, guidance_scale=1, output_type="np",
               generator=torch.Generator("cpu").manual_seed(11))
    images[name] = torch.from_numpy(out.images).contiguous()
assert "stepdistill" not in sys.modules
save_file(images, f"{root}/images.safetensors")
"""


class Exports(NamedTuple):
    root: Path
    sd: ModelFamily
    dit: ModelFamily
    students: dict[str, nn.Module]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("exports")
    sd, dit = load_family(tiny_sd(root / "teacher-sd")), load_family(tiny_dit(root / "teacher-dit"))
    students = {"sd": student_of(sd), "dit": student_of(dit)}
    for name, family in (("sd", sd), ("dit", dit)):
        for spec in (ONE, FOUR):
            export_pipeline(family, students[name], spec, root / f"{name}{spec.num_steps}", facts=FACTS)
    return Exports(root, sd, dit, students)


@pytest.fixture(scope="module")
def fresh_images(exports: Exports) -> dict[str, Tensor]:
    save_file({"latents": LATENTS}, exports.root / "latents.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, str(exports.root)], cwd=exports.root, env=environment, check=True
    )
    images = load_file(exports.root / "images.safetensors")
    return {name: image.permute(0, 3, 1, 2) for name, image in images.items()}


@pytest.mark.parametrize("name", ["sd1", "sd4", "dit1", "dit4"])
def test_plain_diffusers_in_a_fresh_process_gives_the_images_that_were_computed_by_hand(exports, fresh_images, name):
    family, student = (
        (exports.sd, exports.students["sd"]) if name[:2] == "sd" else (exports.dit, exports.students["dit"])
    )
    latents = LATENTS if name[:2] == "sd" else None
    timesteps = (ONE if name[-1] == "1" else FOUR).timesteps
    expected = sample_by_hand(family, student, timesteps, 11, latents)
    assert ((expected > 0.01) & (expected < 0.99)).float().mean() > 0.5, "the images must not be all black and white"
    assert (fresh_images[name] - expected).abs().max() <= 1e-4
    teacher = sample_by_hand(family, family.network(), timesteps, 11, latents)
    assert (fresh_images[name] - teacher).abs().max() > 1e-2, "the student must be told from its teacher"


def test_everything_but_network_and_scheduler_is_the_teachers(exports):
    loaded = StableDiffusionPipeline.from_pretrained(exports.root / "sd1")
    for component in ("vae", "text_encoder"):
        ours, theirs = getattr(loaded, component).state_dict(), getattr(exports.sd.pipeline, component).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert loaded.tokenizer.get_vocab() == exports.sd.pipeline.tokenizer.get_vocab()
    assert loaded.unet.config.cross_attention_dim == 16
    assert not list((exports.root / "sd1").rglob("*.bin")), "safetensors only"
    for file in (exports.root / "sd1").rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), f"{file.name} tells where its maker keeps files"


def test_the_loaded_teacher_is_left_as_it_was(exports):
    assert isinstance(exports.sd.pipeline.scheduler, DDIMScheduler)
    assert exports.sd.pipeline.unet is exports.sd.network()
    assert exports.sd.network() is not exports.students["sd"]
    index = json.loads((exports.root / "sd4" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert exports.sd.pipeline.config["scheduler"][1] == "DDIMScheduler"


def test_class_names_survive_the_export(exports):
    assert DiTPipeline.from_pretrained(exports.root / "dit1").labels == {"crimson": 3, "red": 3, "ring": 7}


def test_the_facts_lie_beside_the_model_index(exports):
    facts = json.loads((exports.root / "sd4" / "distillation_config.json").read_text())
    assert facts["timesteps"] == [999, 749, 499, 249]
    assert (facts["steps"], facts["sampler"], facts["guidance_scale"]) == (4, "stochastic", 1.0)
    assert (facts["method"], facts["recipe_sha256"], facts["scheduler"]) == ("vsd", "abc", "LCMScheduler")
    assert facts["toolkit_version"]
    alpha, sigma = noise_levels(749)
    assert facts["sigmas"][1] == pytest.approx(sigma / alpha, rel=1e-4)


def test_without_a_spec_the_teachers_scheduler_stays(exports, tmp_path):
    folder = export_pipeline(exports.sd, exports.students["sd"], None, tmp_path / "plain", facts={})
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert "timesteps" not in json.loads((folder / "distillation_config.json").read_text())


def test_a_network_in_channels_last_is_exported_as_well(exports, tmp_path):
    student = copy.deepcopy(exports.students["sd"]).to(memory_format=torch.channels_last)
    folder = export_pipeline(exports.sd, student, ONE, tmp_path / "pipeline", facts={})
    loaded = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in exports.students["sd"].state_dict().items())


def test_a_network_with_adapters_is_refused(exports, tmp_path):
    student = copy.deepcopy(exports.students["sd"])
    student.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge"):
        export_pipeline(exports.sd, student, ONE, tmp_path / "pipeline", facts={})
    assert not list(tmp_path.iterdir())


# ---- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timesteps",
    [
        (999,),
        (999, 499),
        (999, 749, 499, 249),
        (999, 666, 333),
        (999, 759, 499, 259),
        (759,),
        (759, 509, 259),
        (2, 1),
    ],
)
def test_a_stochastic_schedule_is_what_the_stock_scheduler_visits_at_the_teachers_noise_levels(timesteps, tmp_path):
    teacher = DDIMScheduler(**BETAS)
    student_scheduler(teacher.config, InferenceSpec(timesteps)).save_pretrained(tmp_path)
    scheduler = LCMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == list(timesteps)
    for t in timesteps:
        assert float(scheduler.alphas_cumprod[t]) == pytest.approx(float(teacher.alphas_cumprod[t]), rel=1e-6)
        # x0 untouched: neither clipped nor mixed with the input
        x, eps = 9 * torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
        alpha, sigma = teacher.alphas_cumprod[t].sqrt(), (1 - teacher.alphas_cumprod[t]).sqrt()
        denoised = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(0)).denoised
        assert torch.allclose(denoised, (x - sigma * eps) / alpha, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("timesteps", [(999,), (999, 749, 499, 249), (999, 666, 332), (625,)])
def test_a_deterministic_schedule_is_eulers_with_trailing_spacing(timesteps, tmp_path):
    teacher = DDIMScheduler(**BETAS)
    spec = InferenceSpec(timesteps, sampler="deterministic")
    student_scheduler(teacher.config, spec).save_pretrained(tmp_path)
    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == list(timesteps)
    # one step from sigma_t * noise reaches (sigma_t * noise - sigma_t * eps) / alpha_t
    if len(timesteps) == 1:
        noise, eps = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
        alpha, sigma = teacher.alphas_cumprod[timesteps[0]].sqrt(), (1 - teacher.alphas_cumprod[timesteps[0]]).sqrt()
        x = scheduler.init_noise_sigma * noise
        assert torch.allclose(scheduler.scale_model_input(x, scheduler.timesteps[0]), sigma * noise, atol=1e-5)
        assert torch.allclose(
            scheduler.step(eps, scheduler.timesteps[0], x).prev_sample, sigma * (noise - eps) / alpha, atol=1e-3
        )


@pytest.mark.parametrize(
    "config",
    [
        DDPMScheduler(beta_schedule="linear").config,
        DDPMScheduler(beta_schedule="squaredcos_cap_v2").config,
        DDPMScheduler(beta_schedule="sigmoid").config,  # LCMScheduler does not know it
        DDPMScheduler(trained_betas=[0.001 + 0.00001 * i for i in range(1000)]).config,
        DDPMScheduler(num_train_timesteps=400).config,
    ],
    ids=["linear", "cosine", "sigmoid", "own table", "400 steps"],
)
@pytest.mark.parametrize("below", [1, 31])
def test_every_table_of_betas_keeps_its_noise_levels(config, below):
    levels = DDPMScheduler.from_config(config).alphas_cumprod
    first = len(levels) - below
    scheduler = student_scheduler(config, InferenceSpec((first,)))
    assert torch.allclose(scheduler.alphas_cumprod, levels[: first + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("first", "keeps_flag"), [(999, True), (900, False)])
def test_zero_terminal_snr_is_kept_and_a_shorter_table_is_not_rescaled_twice(first, keeps_flag):
    teacher = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = student_scheduler(teacher.config, InferenceSpec((first,)))
    assert scheduler.config.rescale_betas_zero_snr is keeps_flag
    assert torch.allclose(scheduler.alphas_cumprod, teacher.alphas_cumprod[: first + 1], rtol=1e-4, atol=1e-8)
    assert scheduler.config.prediction_type == "v_prediction"


def test_nothing_of_the_teachers_sampler_is_inherited():
    teacher = DDIMScheduler(
        **BETAS, clip_sample=True, thresholding=True, set_alpha_to_one=False, timestep_spacing="linspace"
    )
    config = student_scheduler(teacher.config, ONE).config
    assert (config.clip_sample, config.thresholding, config.set_alpha_to_one) == (False, False, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (InferenceSpec((999, 800, 100)), r"no stock .*\[999, 666, 333\]"),
        (InferenceSpec((999, 666, 333), sampler="deterministic"), r"no stock .*\[999, 666, 332\]"),
        (InferenceSpec((1000,)), "at most 999"),
        (InferenceSpec((499, 999)), "fall strictly"),
        (InferenceSpec((499, 0)), "at least 1"),
        (InferenceSpec(()), "fall strictly"),
        (InferenceSpec((999,), sampler="magic"), "sampler 'magic' is unknown"),
    ],
)
def test_a_schedule_without_a_stock_encoding_is_refused_with_a_remedy(spec, message):
    with pytest.raises(UserError, match=message):
        student_scheduler(DDIMScheduler(**BETAS).config, spec)


def test_teachers_without_a_usable_table_are_refused():
    with pytest.raises(UserError, match="no flow-matching scheduler and has no table of betas"):
        student_scheduler({"_class_name": "AmusedScheduler"}, ONE)
    zero_snr = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="zero terminal SNR"):
        student_scheduler(zero_snr.config, ONE)
    assert student_scheduler(zero_snr.config, InferenceSpec((998,))).config.num_train_timesteps == 999


# ---- folders -----------------------------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_and_nothing_else_is_touched(tmp_path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "out", marker="mark") as new:
            (new / "mark").write_text(content)
            (new / content).touch()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mark", "second"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_things_is_refused_and_kept(exports, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not an export"):
        export_pipeline(exports.sd, exports.students["sd"], ONE, tmp_path, facts={})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_a_user_error_and_the_earlier_export_stays(exports, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").write_text("earlier")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        export_pipeline(exports.sd, exports.students["sd"], ONE, tmp_path / "out", facts={})
    assert (tmp_path / "out" / "model_index.json").read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- LoRA --------------------------------------------------------------------------------------------------------


def with_adapters(network: nn.Module, rank: int, alpha: float) -> nn.Module:
    adapted = copy.deepcopy(network)
    adapted.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def test_a_lora_on_the_teacher_in_a_fresh_process_gives_the_adapters_images(exports, tmp_path):
    adapted = with_adapters(exports.sd.network(), rank=4, alpha=12)
    state = get_peft_model_state_dict(adapted)
    folder = export_lora(exports.sd, state, rank=4, alpha=12, folder=tmp_path / "lora", spec=ONE, facts=FACTS)
    expected = sample_by_hand(exports.sd, adapted, ONE.timesteps, 3, LATENTS)
    request = ImageRequest(PROMPTS, steps=1, latents=LATENTS, seed=3)
    assert verify_export(exports.sd.path, expected, request, lora=folder) <= 1e-4
    teacher = sample_by_hand(exports.sd, exports.sd.network(), ONE.timesteps, 3, LATENTS)
    assert (expected - teacher).abs().max() > 1e-2
    header = json.loads((folder / "distillation_config.json").read_text())
    assert (header["rank"], header["method"]) == (4, "vsd")


def test_a_lora_is_checked_on_a_teacher_whose_index_names_a_safety_checker_that_was_never_fetched(exports, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(exports.sd.path, base)
    for name in ("safety_checker", "feature_extractor"):
        shutil.rmtree(base / name, ignore_errors=True)
    index = json.loads((base / "model_index.json").read_text())
    absent = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    (base / "model_index.json").write_text(json.dumps({**index, **absent, "requires_safety_checker": True}))
    adapted = with_adapters(exports.sd.network(), rank=4, alpha=12)
    state = get_peft_model_state_dict(adapted)
    folder = export_lora(exports.sd, state, rank=4, alpha=12, folder=tmp_path / "lora", spec=ONE, facts=FACTS)
    expected = sample_by_hand(exports.sd, adapted, ONE.timesteps, 3, LATENTS)
    assert verify_export(base, expected, ImageRequest(PROMPTS, steps=1, latents=LATENTS, seed=3), lora=folder) <= 1e-4


def loaded_with_lora(family: ModelFamily, folder: Path) -> nn.Module:
    pipeline = StableDiffusionPipeline.from_pretrained(family.path)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet


def test_a_fully_trained_student_is_exact_as_a_lora_of_full_rank(exports, tmp_path):
    student = copy.deepcopy(exports.sd.network())
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.add_(0.05 * torch.randn_like(module.weight))
    difference = difference_lora(exports.sd.network(), student, rank=150)
    assert difference.residual < 1e-6
    assert difference.untargeted == 0
    folder = export_lora(exports.sd, difference.state, rank=150, alpha=150, folder=tmp_path / "lora")
    loaded = loaded_with_lora(exports.sd, folder).state_dict()
    assert loaded.keys() == student.state_dict().keys()
    assert all(torch.allclose(loaded[key], value, atol=1e-5) for key, value in student.state_dict().items())


def test_what_a_lora_keeps_of_a_full_student_is_compared_with_a_fresh_process(exports, tmp_path, monkeypatch):
    student = exports.students["sd"]
    content = tiny_recipe(exports.sd.path, tmp_path / "run", export={"pipeline": False, "lora": True, "lora_rank": 2})
    compared: list[tuple[Any, ...]] = []

    def noting(folder: Path, expected: Tensor, request: ImageRequest, *, lora: Path) -> float:
        compared.append((folder, lora))
        return verify_export(folder, expected, request, lora=lora)  # raises where the images differ

    monkeypatch.setattr(finish, "verify_export", noting)
    state = RoleState(None, dict(student.named_parameters()))
    _, folder = export_student(Recipe.from_mapping(content), exports.sd, state, ONE, RunFolder(tmp_path / "run"),
                               Display(None))  # fmt: skip
    assert compared == [(Path(exports.sd.path), folder)]
    kept = copy.deepcopy(exports.sd.network())
    with torch.no_grad():
        for ours, theirs in zip(kept.modules(), student.modules(), strict=True):
            if isinstance(ours, nn.Linear | nn.Conv2d):
                u, s, v = torch.linalg.svd((theirs.weight - ours.weight).flatten(1), full_matrices=False)
                ours.weight += ((u[:, :2] * s[:2]) @ v[:2]).reshape(ours.weight.shape)
    loaded = loaded_with_lora(exports.sd, folder).state_dict()
    assert all(torch.allclose(loaded[key], value, atol=1e-5) for key, value in kept.state_dict().items())
    images = [sample_by_hand(exports.sd, network, ONE.timesteps, 3, LATENTS) for network in (kept, student)]
    assert (images[0] - images[1]).abs().max() > 1e-2, "the student's own images are others, and would not do"


def test_a_truncated_lora_loses_exactly_the_small_singular_values():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.Conv2d(3, 5, 3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(torch.randn(9, 6))
        tuned[1].weight.add_(torch.randn(5, 3, 3, 3))
    difference = difference_lora(base, tuned, rank=2)
    values = [torch.linalg.svdvals((tuned[i].weight - base[i].weight).detach().flatten(1)) for i in (0, 1)]
    lost, total = (sum(float(v[k:].square().sum()) for v in values) for k in (2, 0))
    assert difference.residual == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert difference.state["0.lora_A.weight"].shape == (2, 6)
    assert difference.state["1.lora_A.weight"].shape == (2, 3, 3, 3)
    assert difference.state["1.lora_B.weight"].shape == (5, 2, 1, 1)


def test_what_no_lora_can_carry_is_told():
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[1].weight[0] += 3.0
        tuned[0].weight[0, 0] += 4.0
    difference = difference_lora(base, tuned, rank=4)
    assert difference.residual == pytest.approx(3 / 5)
    assert difference.untargeted == pytest.approx(3 / 5)
    only_last = difference_lora(base, tuned, rank=4, targets=["2"])
    assert only_last.residual == only_last.untargeted == pytest.approx(1.0)
    assert set(only_last.state) == {"2.lora_A.weight", "2.lora_B.weight"}
    assert difference_lora(base, base, rank=4).residual == 0


def test_a_lora_without_a_layer_or_a_rank_is_a_user_error():
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="named like nothing"):
        difference_lora(network, network, rank=1, targets=["nothing"])
    with pytest.raises(UserError, match="lora_rank"):
        difference_lora(network, network, rank=0)


def test_alpha_is_folded_into_b_once():
    state = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)}
    folded = fold_alpha(state, rank=2, alpha=6)
    assert torch.equal(folded["x.lora_A.weight"], torch.ones(2, 3))
    assert torch.equal(folded["x.lora_B.weight"], 3 * torch.ones(4, 2))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x.lora.down.weight": torch.ones(2, 3)}, "no PEFT LoRA key"),
        ({"x.lora_A.default.weight": torch.ones(2, 3)}, "no PEFT LoRA key"),
        ({"x.lora_A.weight": torch.ones(3, 3), "x.lora_B.weight": torch.ones(4, 3)}, "rank 3, expected 2"),
        ({"x.lora_A.weight": torch.ones(2, 3)}, "a lora_A and a lora_B"),
        ({}, "a lora_A and a lora_B"),
    ],
)
def test_lora_states_of_another_kind_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        fold_alpha(state, rank=2, alpha=2)


def test_a_pipeline_without_a_lora_loader_is_refused_with_a_remedy(exports, tmp_path):
    with pytest.raises(UserError, match=r"export\.lora=false"):
        export_lora(exports.dit, {}, rank=2, alpha=2, folder=tmp_path / "lora")
    assert not list(tmp_path.iterdir())


# ---- the check itself ----------------------------------------------------------------------------------------------


def test_other_images_a_nan_and_another_shape_fail_the_check(monkeypatch, tmp_path):
    made = torch.full((1, 3, 4, 4), 0.5)
    monkeypatch.setattr(verify, "_run", lambda job, cwd: save_file({"images": made}, cwd / "images.safetensors"))
    request = ImageRequest(["a"], steps=1)
    assert verify_export(tmp_path, made + 5e-5, request) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(ExportMismatchError, match=r"largest difference 2\.00e-04"):
        verify_export(tmp_path, made + 2e-4, request)
    with pytest.raises(ExportMismatchError, match="nan"):
        verify_export(tmp_path, made * torch.nan, request)
    with pytest.raises(ExportMismatchError, match=r"\(1, 3, 4, 4\), expected \(2, 3, 4, 4\)"):
        verify_export(tmp_path, made.expand(2, -1, -1, -1), request)


def test_an_export_that_does_not_load_is_reported_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(
        verify, "_SCRIPT", "import sys, json; sys.exit('no such ' + json.loads(sys.argv[1])['folder'])"
    )
    with pytest.raises(ExportMismatchError, match=f"no such {tmp_path}"):
        verify_export(tmp_path, torch.zeros(1), ImageRequest(["a"], steps=1))


# ---- the card ----------------------------------------------------------------------------------------------------

ROWS = [
    {"model": "teacher", "nfe": 50, "fid": 3.0, "kid": None, "caption_accuracy": 0.97, "train_seconds": None},
    {"model": "student", "nfe": 1, "fid": 3.456, "kid": None, "caption_accuracy": None, "train_seconds": 12.0},
]


def test_the_table_leaves_out_columns_without_a_value():
    assert markdown_table(ROWS).splitlines() == [
        "| Model | NFE | FID | Caption accuracy |",
        "| --- | ---: | ---: | ---: |",
        "| teacher | 50 | 3.00 | 97.0 % |",
        "| student | 1 | 3.46 | - |",
    ]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for name in ("pipeline", "lora"):
        (tmp_path / name).mkdir()
        facts = {"pipeline": "StableDiffusionPipeline", "scheduler": "LCMScheduler", "sigmas": [14.6146]}
        extra = {"rank": 32, "residual": 0.25} if name == "lora" else {}
        (tmp_path / name / "distillation_config.json").write_text(json.dumps({**facts, **extra}))
    return tmp_path


def front_matter(card: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return ModelCard.load(card).data.to_dict()


def test_the_card_says_how_to_call_the_student_and_what_was_measured(run_folder):
    recipe = {"name": "quick", "teacher": "owner/model", "stages": [{"objective": {"name": "vsd"}}]}
    card = write_card(run_folder, recipe=recipe, spec=ONE, report={"rows": ROWS, "device": "cpu"}, picture="p.png")
    text = card.read_text()
    for needed in (
        "num_inference_steps=1, guidance_scale=1", 'load_lora_weights("lora")', "sgm_uniform", "14.6146, 0",
        'LCMScheduler.from_pretrained("lora", subfolder="scheduler")', markdown_table(ROWS), "25.0 %", "name: vsd",
        "![samples](p.png)",
    ):  # fmt: skip
        assert needed in text
    data = front_matter(card)
    assert data["base_model"] == "owner/model"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"text-to-image", "distillation", "lora"} <= set(data["tags"])


def test_a_card_for_which_there_is_no_room_is_a_user_error_and_the_earlier_one_stays(run_folder, monkeypatch):
    recipe = {"teacher": "owner/model"}
    before = write_card(run_folder, recipe=recipe, spec=ONE).read_text()

    def full(path, text, **_):
        path.write_bytes(text.encode()[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"README\.md could not be written \(No space left on device\); make room"):
        write_card(run_folder, recipe={"teacher": "other/model"}, spec=ONE)
    assert (run_folder / "README.md").read_text() == before


def test_the_cards_snippet_runs_as_it_stands(exports, tmp_path, monkeypatch):
    (tmp_path / "pipeline").symlink_to(exports.root / "sd1")
    text = write_card(tmp_path, recipe={"teacher": exports.sd.path}, spec=ONE).read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["image"].size == (16, 16)
    assert "load_lora_weights" not in text


def test_the_card_passes_eta_where_the_scheduler_takes_it(run_folder):
    spec = InferenceSpec((999, 499), "tcd", eta=0.3)
    for scheduler, passed in (("TCDScheduler", True), ("FlowMatchLCMScheduler", False)):
        facts = {"pipeline": "StableDiffusionPipeline", "scheduler": scheduler, "sigmas": [14.6, 1.6]}
        (run_folder / "pipeline" / "distillation_config.json").write_text(json.dumps(facts))
        text = write_card(run_folder, recipe={"teacher": "owner/model"}, spec=spec).read_text()
        assert ("num_inference_steps=2, guidance_scale=1, eta=0.3)" in text) == passed
        assert ("torch.manual_seed(seed)" in text) != passed, "flow pipelines draw noise from torch's own generator"


def test_a_local_teacher_is_no_base_model_for_the_hub(run_folder):
    card = write_card(run_folder, recipe={"teacher": "assets/shapes/teacher"}, spec=FOUR)
    assert "base_model" not in front_matter(card)
    assert "Distilled from `assets/shapes/teacher`: an image takes 4 network calls" in card.read_text()
