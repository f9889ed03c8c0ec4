"""The flow-matching teacher's parts: a StableDiffusion3Pipeline on the latents and captions of the UNet's.

The stock pipeline asks for three text encoders. The captions are read by the first alone; the other two are as small
as their classes allow, and say nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, FunnelBaseModel, FunnelConfig

from stepdistill.export.pipeline import forget_origin
from stepdistill.files import replacing


BUNDLED = Path(__file__).resolve().parents[2] / "assets/shapes/teacher"
EMPTY_WIDTH = 8  # of the second text encoder
WIDTH, HEADS, BLOCKS, PATCH = 128, 4, 6, 2  # of the transformer; a step costs less than the UNet's


def transformer(text_width: int) -> SD3Transformer2DModel:
    """The teacher's network, 4x4 image tokens beside the text's, initialised for training.

    Args:
        text_width: features of a text token, and of a caption as a whole, from all encoders together.
    """
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=PATCH, in_channels=4, out_channels=4, num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=text_width,
        caption_projection_dim=WIDTH, pooled_projection_dim=text_width, pos_embed_max_size=8 // PATCH,
        qk_norm="rms_norm",
    )  # fmt: skip
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        # As DiT (arXiv 2212.09748, section 3.2): at first every block is the identity and the output is 0.
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
    return network


def text_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """The trained encoder, so arranged that the stock pipeline reads what it was trained to say.

    The pipeline takes tokens from the layer before the last, and the caption as a whole from the end. So there is one
    more layer, which changes nothing, and a projection that is the identity.
    """
    config = CLIPTextConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    encoder = CLIPTextModelWithProjection.from_pretrained(
        folder, num_hidden_layers=layers + 1, projection_dim=config.hidden_size, dtype=torch.float32
    )
    last = encoder.text_model.encoder.layers[layers]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        silence(linear)
    nn.init.eye_(encoder.text_projection.weight)
    return encoder


def silence(module: nn.Module) -> nn.Module:
    """All parameters 0, so that all outputs are."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def second_encoder(tokenizer: CLIPTokenizer) -> nn.Module:
    """A CLIP of one narrow layer whose tokens and whose caption are 0."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=EMPTY_WIDTH, intermediate_size=EMPTY_WIDTH, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=tokenizer.model_max_length, projection_dim=EMPTY_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return silence(CLIPTextModelWithProjection(config))


def third_encoder(tokenizer: CLIPTokenizer, width: int) -> nn.Module:
    """A FunnelModel in the place of T5, whose 4 tokens are 0.

    The stock pipeline pads this encoder's text to 256 tokens, ten times the length of a caption, and a T5 would give
    the transformer all of them to compute with, at every step. A funnel halves its sequence from block to block.
    Diffusers remarks when it loads the pipeline that this is no T5.
    """
    config = FunnelConfig(
        vocab_size=len(tokenizer), block_sizes=[1] * 7, num_decoder_layers=0, d_model=width, n_head=1, d_head=8,
        d_inner=8,
    )  # fmt: skip
    return silence(FunnelBaseModel(config))


def assemble(parts: Path, seed: int) -> None:
    """Puts the parts together as a StableDiffusion3Pipeline in `parts`/untrained-flow, its transformer untrained.

    What `parts` does not hold is taken from the bundled UNet's teacher.
    """
    text = parts / "text"
    first = text_encoder(text if text.is_dir() else BUNDLED / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(text if text.is_dir() else BUNDLED / "tokenizer")
    width = first.config.hidden_size + EMPTY_WIDTH
    torch.manual_seed(seed)
    StableDiffusion3Pipeline(
        transformer=transformer(width), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder(parts), text_encoder=first, tokenizer=tokenizer, text_encoder_2=second_encoder(tokenizer),
        tokenizer_2=tokenizer, text_encoder_3=third_encoder(tokenizer, width), tokenizer_3=tokenizer,
    ).to(torch.float16).save_pretrained(parts / "untrained-flow")  # fmt: skip


def autoencoder(parts: Path) -> AutoencoderKL:
    """That of the UNet's teacher, whose decoder may have been trained for longer; this pipeline also knows a shift."""
    made = [folder for folder in (parts / "decoder", parts / "autoencoder") if folder.is_dir()]
    model = AutoencoderKL.from_pretrained((made or [BUNDLED / "vae"])[0])
    model.register_to_config(shift_factor=0.0)
    return model


def install(parts: Path, teacher: Path, folder: Path) -> None:
    """Puts the trained teacher, in fp16 and with the newest decoder, where the package looks for it."""
    own = {"vae": autoencoder(parts)} if (parts / "decoder").is_dir() else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(teacher, **own)
    with replacing(folder) as new:
        pipeline.to(torch.float16).save_pretrained(new)
        forget_origin(new)
