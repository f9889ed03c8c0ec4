"""The flow-matching teacher of the shapes benchmark, as its command assembles it; trained weights take no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.shapes import flow_teacher
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily


ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ["a large red circle on white", "a small blue ring left of a green square"]
WIDTH = 128


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other commands leave, with random weights and the bundled vocabulary; then the assembled teacher."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets/shapes/teacher/tokenizer")
    tokenizer.save_pretrained(folder / "text")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=24, projection_dim=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CLIPTextModel(config).half().save_pretrained(folder / "text")
    for name in ("autoencoder", "decoder"):
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, sample_size=64, scaling_factor=1.0,
        ).half().save_pretrained(folder / name)  # fmt: skip
    flow_teacher.assemble(folder, 20260101)
    return folder


@pytest.fixture(scope="module")
def family(parts: Path) -> ModelFamily:
    return load_family(str(parts / "untrained-flow"))


def test_it_is_a_flow_matching_teacher_of_the_benchmarks_images(family: ModelFamily) -> None:
    assert (family.name, family.kind, family.latent_shape(), family.image_size) == ("sd3", "flow", (4, 8, 8), 64)
    assert family.schedule.model_time(torch.tensor([0.25, 1.0])).tolist() == [250, 1000]
    assert 3.0e6 < sum(p.numel() for p in family.network().parameters()) < 4.0e6


def test_captions_reach_the_transformer_as_the_text_encoder_was_taught_to_state_them(
    family: ModelFamily, parts: Path
) -> None:
    trained = CLIPTextModel.from_pretrained(parts / "text", dtype=torch.float32)
    ids = family.pipeline.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        stated = trained(ids)
        condition = family.encode_prompts(CAPTIONS).tensors
        tokens = trained.final_layer_norm(condition["prompt_embeds"][:, :24, :WIDTH])
    assert condition["prompt_embeds"].shape == (2, 24 + 4, WIDTH + 8)
    torch.testing.assert_close(tokens, stated.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        condition["pooled_prompt_embeds"][:, :WIDTH], stated.pooler_output, rtol=1e-4, atol=1e-4
    )
    assert (stated.pooler_output[0] - stated.pooler_output[1]).abs().max() > 0.1


def test_the_two_encoders_that_the_class_demands_say_nothing(family: ModelFamily) -> None:
    condition = family.encode_prompts(CAPTIONS).tensors
    for said in (condition["prompt_embeds"][:, 24:], condition["prompt_embeds"][:, :, WIDTH:],
                 condition["pooled_prompt_embeds"][:, WIDTH:]):  # fmt: skip
        assert torch.equal(said, torch.zeros_like(said))
    sizes = [sum(p.numel() for p in module.parameters()) for module in family.text_modules().values()]
    assert sum(sizes[1:]) < 0.25 * sizes[0]


def test_training_starts_from_nothing_that_moves(family: ModelFamily) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        said = family.denoiser()(x, t, family.encode_prompts(CAPTIONS))
    assert torch.equal(said.native, torch.zeros_like(x))
    network = family.plain_network()
    network.load_state_dict(family.network().state_dict())
    network.requires_grad_(True)
    condition = family.encode_prompts(CAPTIONS).tensors
    output = network(x, condition["prompt_embeds"], condition["pooled_prompt_embeds"], t * 1000).sample
    output.sum().backward()
    assert network.get_submodule("proj_out").weight.grad.abs().max() > 0  # type: ignore[union-attr, operator]


def test_the_stock_pipeline_draws_images_with_it(parts: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(parts / "untrained-flow", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusion3Pipeline
    tokens: list[int] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    images = pipeline(CAPTIONS, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
    assert tokens == [28, 28], "a caption of 24 and the funnel's 4, not the 256 that a T5 would be given"


def test_install_takes_the_newest_decoder_and_keeps_the_makers_paths_out(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flow"
    flow_teacher.install(parts, parts / "untrained-flow", folder)
    newest = load_file(parts / "decoder" / "diffusion_pytorch_model.safetensors")
    installed = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(newest[name], tensor) for name, tensor in installed.items())
    assert json.loads((folder / "vae/config.json").read_text())["shift_factor"] == 0.0
    network = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in network.values()} == {torch.float16}
    for file in folder.rglob("*.json"):
        assert str(tmp_path.parent) not in file.read_text()
    assert load_family(str(folder)).name == "sd3"
