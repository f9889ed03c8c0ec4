"""Tokenizers, text encoders and an autoencoder without files, for tiny random pipelines of the real classes.

The tokenizers know letters and no words. Sizes: some ten channels, so that a network takes milliseconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from string import ascii_lowercase
from typing import Any

import torch


SPACE = "\u2581"  # what sentencepiece writes for a space


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random weights are a function of the seed; outside, torch's generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def t5_tokenizer(length: int = 32) -> Any:
    """A T5 tokenizer of letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", SPACE, *ascii_lowercase]
    return T5Tokenizer(
        vocab=[(piece, -2.0 if n > 2 else 0.0) for n, piece in enumerate(pieces)], extra_ids=0,
        model_max_length=length,
    )  # fmt: skip


def t5_encoder(width: int) -> Any:
    """A T5 encoder for `t5_tokenizer`, tokens of `width` channels."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def clip_tokenizer(length: int = 8) -> Any:
    """A CLIP tokenizer of letters."""
    from transformers import CLIPTokenizer

    words = [*ascii_lowercase, *(x + "</w>" for x in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=length)


def clip_encoder(width: int, length: int = 8) -> Any:
    """A CLIP text encoder for `clip_tokenizer`, a pooled vector of `width` channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=length, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        )
    )  # fmt: skip


def gemma_tokenizer(length: int = 4096) -> Any:
    """A Gemma tokenizer of letters."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", SPACE, *ascii_lowercase]
    return GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=length)


def gemma(width: int) -> Any:
    """A Gemma 2 model for `gemma_tokenizer`, hidden states of `width` channels."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=32, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=4096,
        )
    )  # fmt: skip


def kl_autoencoder(stages: int, channels: int = 4, shift: float | None = None) -> Any:
    """An AutoencoderKL for images of 2^(stages - 1) times the side of its latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * stages, down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages, latent_channels=channels, norm_num_groups=4,
        layers_per_block=1, scaling_factor=0.5, shift_factor=shift,
    )  # fmt: skip
