"""Small things that many tests need: tiny teachers of the real classes, recipes for them, a trainer without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.adapters import LoraSettings
from stepdistill.cast import Cast
from stepdistill.checkpoint import Checkpoints
from stepdistill.condition import Condition
from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.latents import LatentBatch
from stepdistill.data.prompts import PromptSet
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Frozen, InferenceSpec, Loss, Objective, Phase, Role, Step, Trained
from stepdistill.player import Player, PlayerSettings
from stepdistill.processes.sharding import Sharding
from stepdistill.trainer import Trainer, TrainerSettings


# Short enough for the tiny tokenizer, which knows letters and no words.
PROMPTS = tuple("abcdefghijklmnopqrstuvwx")
LORA = LoraSettings(rank=2, alpha=4.0, targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"))


def tiny_recipe(teacher: str, output: Path, **changes: Any) -> dict[str, Any]:
    """The content of a recipe with every kind of state: LoRA and full weights, averages, two micro-batches."""
    prompts = output.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS) + "\n")
    content: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "teacher": teacher,
        "device": "cpu",
        "data": {"prompts": str(prompts)},
        "stages": [
            {
                "objective": {"name": "dmd2", "guidance": 2.0, "critic_updates": 1},
                "steps": 6,
                "batch_size": 2,
                "accumulate": 2,
                "players": {
                    "default": {"optimizer": {"lr": 1e-3}, "ema": 0.9},
                    "student": {"weights": {"lora": {"rank": 2}}},
                },
            }
        ],
        "checkpoints": {"every": 2},
        "previews": None,
        "health": None,
        "export": {"pipeline": False, "lora": False},
    }
    return {**content, **changes}


def tiny_sd3(folder: Path) -> str:
    """A StableDiffusion3Pipeline with random weights, saved to a folder; images of 16 pixels.

    A FunnelModel stands where T5 does, as in the bundled teacher: it makes 8 tokens of the pipeline's 256.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        FunnelBaseModel,
        FunnelConfig,
    )

    torch.manual_seed(2)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8)
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=8, projection_dim=width, bos_token_id=52,
                eos_token_id=53, pad_token_id=53,
            )
        )
        for width in (16, 8)
    ]  # fmt: skip
    funnel = FunnelConfig(
        vocab_size=len(words), block_sizes=[1] * 6, num_decoder_layers=0, d_model=24, n_head=1, d_head=8, d_inner=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
        shift_factor=0.25,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=FunnelBaseModel(funnel), tokenizer_3=tokenizer,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def scramble(parameters: Mapping[str, torch.nn.Parameter], seed: int = 0, scale: float = 0.3) -> None:
    """Random values, so that an adapter that starts as zero does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def picture_of(condition: Condition, shape: tuple[int, int, int]) -> Tensor:
    """A latent that is a function of the prompt alone, (B, C, H, W)."""
    flat = condition.tensors["prompt_embeds"].flatten(1).float()
    size = shape[0] * shape[1] * shape[2]
    return flat.repeat(1, -(-size // flat.shape[1]))[:, :size].reshape(-1, *shape)


class PaintedLatents:
    """An images stream without images: noise with an offset, a function of the arguments alone."""

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        generator = torch.Generator().manual_seed(1000 * seed + start)
        captions = [PROMPTS[number % len(PROMPTS)] for number in range(start, start + count)]
        return LatentBatch(1.5 + 0.5 * torch.randn(count, 4, 8, 8, generator=generator), captions)


@dataclass(frozen=True)
class Copying:
    """A game without randomness: the student learns to say minus what it is given."""

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("copying", ("student",), self.loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec((999,))

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        x_t = picture_of(batch.condition, batch.latent_shape)
        t = torch.full((len(batch),), 0.5, dtype=torch.float64)
        said = cast.denoiser("student")(x_t, t, batch.condition).native
        return Loss({"copying": (said + x_t).square().mean()})


def trainer_of(
    family: ModelFamily,
    objective: Objective,
    *,
    lora: Mapping[str, LoraSettings] | None = None,
    folder: Path | None = None,
    accelerator: Accelerator | None = None,
    checkpointing: bool = False,
    player: Mapping[str, Any] | None = None,
    texts: Sequence[str] = PROMPTS,
    sharding: Sharding | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of one stage without a recipe; the folder, if any, gets checkpoints and the log."""
    accelerator = accelerator or Accelerator(cpu=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    cast = Cast(family, objective.roles(), lora=lora, checkpointing=checkpointing, sharding=sharding)
    options = {"optimizer": torch.optim.AdamW, "options": {"lr": 1e-3}, **(player or {})}
    players = {
        name: Player(name, cast.parameters(name), PlayerSettings(**options), accelerator) for name in cast.trained
    }
    prompts = PromptSet(tuple(texts))
    batches = Batches(
        family, prompts, EncodedOnTheFly(family, prompts), None, 0, accelerator.process_index,
        accelerator.num_processes,
    )  # fmt: skip
    return Trainer(
        cast, objective, players, batches, accelerator,
        TrainerSettings(**{"steps": 2, "batch_size": 2, **settings}),
        None if folder is None else Checkpoints(folder / "checkpoints"),
        None if folder is None else folder / "metrics.jsonl",
    )  # fmt: skip


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of all trained weights."""
    return {
        f"{role}/{name}": p.detach().clone()
        for role in trainer.players
        for name, p in trainer.cast.parameters(role).items()
    }
