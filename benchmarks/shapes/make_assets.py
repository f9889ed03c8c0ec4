"""Makes the networks of the shapes benchmark that are not distilled: the autoencoder, and the CLIP model.

    python benchmarks/shapes/make_assets.py clip          # CLIP on rendered scenes: the evaluator, and the tokenizer
    python benchmarks/shapes/make_assets.py text          # the teacher's text encoder, on captions alone
    python benchmarks/shapes/make_assets.py autoencoder   # AutoencoderKL, factor 8, 4 latent channels
    python benchmarks/shapes/make_assets.py decoder       # goes on with the decoder alone; the latents stay
    python benchmarks/shapes/make_assets.py assemble      # the teacher's folder with a UNet of random weights
    stepdistill train recipes/shapes/teacher.yaml         # trains that UNet
    python benchmarks/shapes/make_assets.py install       # puts teacher and evaluator into assets/shapes, in fp16

and for the flow-matching teacher, on the same autoencoder and text encoder,

    python benchmarks/shapes/make_assets.py assemble-flow # its folder with a transformer of random weights
    stepdistill train recipes/shapes/flow_teacher.yaml    # trains that transformer
    python benchmarks/shapes/make_assets.py install-flow  # puts it into assets/shapes/flow

Each command writes a checkpoint every few hundred steps under --work and, started again, goes on from it. The teacher
itself is trained by `stepdistill train recipes/shapes/teacher.yaml`; `gates.py` measures all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flow_teacher
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from stepdistill.data import shapes
from stepdistill.export.pipeline import forget_origin
from stepdistill.files import replacing


ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 24  # the longest caption has 21 words
TEXT_WIDTH = 128
SEED = 20260101
CLIP_DATA_SEED, VAE_DATA_SEED, TEXT_DATA_SEED = 11, 12, 15  # the teacher's recipe and the benchmark use others
LossOf = Callable[[int, torch.Tensor, list[str]], torch.Tensor]  # step, images, captions => loss
ASKED = ("shape", "shape", "color", "size", "background")  # of siblings: shapes are the hardest to tell apart
FORMS_FIRST = 1500  # autoencoder steps before the objects get more weight
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair encoding learnt on captions until every word is one token; spelling falls back to letters."""
    captions = [scene.caption for scene, _ in zip(shapes.captioned_scenes(CLIP_DATA_SEED), range(4000), strict=False)]
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False,
    ))  # fmt: skip
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    words = sorted(model["vocab"], key=model["vocab"].get)
    words += [letter + "</w>" for letter in letters if letter + "</w>" not in model["vocab"]]
    vocab = {word: index for index, word in enumerate([*words, START, END])}
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, bos_token=START, eos_token=END, unk_token=END,
        pad_token=END,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A CLIP with 64 image patches of 8 pixels and the small vocabulary."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=64,
        patch_size=8, projection_dim=64,
    )  # fmt: skip
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)


def autoencoder() -> AutoencoderKL:
    """Factor 8, 4 latent channels; narrow at full resolution, where the cost is."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8,
        sample_size=shapes.IMAGE_SIZE,
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """The teacher's network: cross-attention at 8x8, 4x4 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


@dataclass(frozen=True)
class Scenes(Dataset[tuple[torch.Tensor, list[str]]]):
    """Item `step` is that step's batch: images (B, 3, 64, 64) in [-1, 1] and captions.

    With siblings, every other batch is pairs of scenes that differ in one attribute, under captions that name
    everything: what tells them apart must be seen and read.
    """

    seed: int
    count: int
    siblings: bool = False

    def __getitem__(self, step: int) -> tuple[torch.Tensor, list[str]]:
        start = step * self.count
        scenes = [shapes.captioned_scene(self.seed, start + i) for i in range(self.count)]
        if self.siblings and step % 2 == 0:
            rng = random.Random(f"{self.seed}/siblings/{step}")
            pairs = [(s.scene, shapes.sibling(s.scene, rng, rng.choice(ASKED))) for s in scenes[: self.count // 2]]
            scenes = [shapes.caption_scene(scene, rng, keep=1.0) for pair in pairs for scene in pair]
        return shapes.to_tensor([shapes.render(s.scene) for s in scenes]), [s.caption for s in scenes]


@dataclass(frozen=True)
class Captions(Dataset[tuple[torch.Tensor, list[str]]]):
    """Item `step` is that step's batch: what each caption demands, (B, 9) class numbers, and captions.

    Columns: number of objects, relation, background, then shape, colour and size of the first and of the second
    object. Class 0 is "left open"; -100 marks the second object where there is none.
    """

    seed: int
    count: int

    def __getitem__(self, step: int) -> tuple[torch.Tensor, list[str]]:
        cases = [shapes.captioned_scene(self.seed, step * self.count + i) for i in range(self.count)]
        return torch.tensor([demanded_classes(case.demand) for case in cases]), [case.caption for case in cases]


# Values of the columns of `Captions`.
OBJECT_VALUES = (shapes.SHAPES, tuple(shapes.COLORS), tuple(shapes.SIZES))
SCENE_VALUES = (("two",), shapes.RELATIONS, tuple(shapes.BACKGROUNDS))


def demanded_classes(demand: shapes.Demand) -> list[int]:
    """One row of `Captions`."""

    def number(value: str | None, values: tuple[str, ...]) -> int:
        return 0 if value is None else 1 + values.index(value)

    row = [len(demand.objects) - 1, number(demand.relation, shapes.RELATIONS)]
    row.append(number(demand.background, tuple(shapes.BACKGROUNDS)))
    for o in demand.objects:
        row += [number(value, values) for value, values in zip((o.shape, o.color, o.size), OBJECT_VALUES, strict=True)]
    return row + [-100] * (9 - len(row))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, the peak for three fifths of the time, then a half cosine to 1 % of it."""
    decay = max(0.0, (step / steps - 0.6) / 0.4)
    return peak * min(1.0, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * decay))


def fit(model: torch.nn.Module, loss_of: LossOf, scenes: Scenes, *, steps: int, peak: float, work: Path) -> None:
    """Adam with the schedule above, a resumable checkpoint every 250 steps and a line of log every 50."""
    work.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    names = [name for name, _ in model.named_parameters()]
    checkpoint, first = work / "checkpoint.safetensors", 0
    if checkpoint.exists():
        state = load_file(checkpoint)
        first = int(state.pop("step"))
        model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        moments = {i: {m: state[f"{m}.{n}"] for m in ("exp_avg", "exp_avg_sq")} for i, n in enumerate(names)}
        for moment in moments.values():
            moment["step"] = torch.tensor(float(first))
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    device = next(model.parameters()).device
    # Rendering costs as much as a small network's step; with spare cores it happens beside it.
    spare = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
    batches = DataLoader(scenes, batch_size=None, sampler=range(first, steps), num_workers=min(spare, 12))
    began = time.monotonic()
    for step, (images, captions) in zip(range(first, steps), batches, strict=True):
        torch.manual_seed(SEED + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(step, images.to(device), captions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            pace = (time.monotonic() - began) / (step - first + 1)
            print(f"step {step}/{steps} loss {loss.item():.5f} {pace:.3f} s/step", flush=True)
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
            for parameter, name in zip(model.parameters(), names, strict=True):
                for m in ("exp_avg", "exp_avg_sq"):
                    state[f"{m}.{name}"] = optimizer.state[parameter][m].contiguous()
            state["step"] = torch.tensor(step + 1)
            state = {name: tensor.cpu() for name, tensor in state.items()}
            save_file(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)


def made_before(folder: Path) -> CLIPTokenizer | None:
    """The tokenizer that an interrupted training began with: a new one may number its words differently."""
    return CLIPTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None


def make_clip(work: Path, output: Path, steps: int, device: str) -> None:
    """Contrastive training; half of the batches are siblings, so that fine distinctions are asked for."""
    tokenizer = made_before(output / "clip") or train_tokenizer(output / "clip")
    torch.manual_seed(SEED)
    model = CLIPModel(clip_config(tokenizer)).to(device).train()

    def loss_of(step: int, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        return model(pixel_values=images, input_ids=tokens.input_ids.to(device), return_loss=True).loss

    scenes = Scenes(CLIP_DATA_SEED, 192, siblings=True)
    fit(model, loss_of, scenes, steps=steps, peak=1e-3, work=work / "clip")
    model.eval().half().save_pretrained(output / "clip")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    processor.save_pretrained(output / "clip")


class Reader(torch.nn.Module):
    """A text encoder with linear heads that say what a caption demands."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.encoder = CLIPTextModel(config)
        of_object = [len(values) + 1 for values in OBJECT_VALUES]
        self.of_scene = [len(values) + 1 for values in SCENE_VALUES] + 2 * of_object
        self.of_noun = of_object
        self.scene = torch.nn.Linear(config.hidden_size, sum(self.of_scene))
        self.noun = torch.nn.Linear(config.hidden_size, sum(self.of_noun))


def make_text(work: Path, output: Path, steps: int, device: str) -> None:
    """Teaches the text encoder to state what a caption demands: all of it at the end, its object at every noun.

    A contrastive text tower keeps only what its image tower tells apart: with that of `clip`, "circle" and "square"
    were the same vector but for a fifteenth of its length, and no teacher could obey the word.
    """
    tokenizer = made_before(output / "text") or CLIPTokenizer.from_pretrained(output / "clip")
    tokenizer.save_pretrained(output / "text")
    torch.manual_seed(SEED)
    reader = Reader(clip_config(tokenizer).text_config).to(device).train()
    nouns = torch.tensor(
        tokenizer.convert_tokens_to_ids([f"{n}</w>" for n in (*shapes.SHAPES, *shapes.UNNAMED_SHAPE)])
    )

    def loss_of(step: int, classes: torch.Tensor, captions: list[str]) -> torch.Tensor:
        ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        states = reader.encoder(ids.to(device)).last_hidden_state
        ended = (ids == tokenizer.eos_token_id).to(device)  # the end, and the padding behind it: all see everything
        loss = cross_entropies(reader.scene(states[ended]), reader.of_scene, classes[ended.nonzero()[:, 0]])
        is_noun = torch.isin(ids, nouns).to(device)
        row, place = is_noun.nonzero().T
        which = is_noun.cumsum(1)[row, place] - 1  # the first or the second object
        own = torch.stack([classes[row, 3 + 3 * which + i] for i in range(3)], dim=1)
        return loss + cross_entropies(reader.noun(states[is_noun]), reader.of_noun, own)

    fit(reader, loss_of, Captions(TEXT_DATA_SEED, 256), steps=steps, peak=1e-3, work=work / "text")
    reader.encoder.eval().half().save_pretrained(output / "text")


def cross_entropies(logits: torch.Tensor, sizes: list[int], classes: torch.Tensor) -> torch.Tensor:
    """Mean over questions of the cross-entropy: logits (N, sum of sizes), class numbers (N, questions)."""
    parts = zip(logits.split(sizes, dim=1), classes.T, strict=True)
    return torch.stack([torch.nn.functional.cross_entropy(part, target) for part, target in parts]).mean()


def make_autoencoder(work: Path, output: Path, steps: int, device: str) -> None:
    """Squared and absolute error with a light Kullback-Leibler term; latents are then normalised per channel."""
    torch.manual_seed(SEED)
    model = autoencoder().to(device, memory_format=torch.channels_last).train()

    def loss_of(step: int, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        posterior = model.encode(images).latent_dist
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        # Objects cover a tenth of the pixels, and their colours come last: once the forms are there, they count more.
        extra = 5.0 if step >= FORMS_FIRST else 0.0
        return reconstruction(model.decode(posterior.sample()).sample, images, extra) + 2e-4 * kl

    fit(model, loss_of, Scenes(VAE_DATA_SEED, 16), steps=steps, peak=2e-3, work=work / "autoencoder")
    model.eval()
    normalise_latents(model)
    model.half().save_pretrained(output / "autoencoder")


def foreground(images: torch.Tensor) -> torch.Tensor:
    """Where the objects are: (B, 3, H, W) => (B, 1, H, W) of 0 and 1. The top left pixel is always background."""
    return ((images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()


def reconstruction(decoded: torch.Tensor, images: torch.Tensor, extra: float) -> torch.Tensor:
    """Squared plus a tenth of the absolute error; pixels of objects weigh 1 + extra."""
    error = decoded - images
    return ((1 + extra * foreground(images)) * (error.square() + 0.1 * error.abs())).mean()


def make_decoder(work: Path, output: Path, steps: int, device: str) -> None:
    """Trains the decoder alone for longer: the latents, and so every teacher trained on them, stay as they are."""
    torch.manual_seed(SEED)
    model = AutoencoderKL.from_pretrained(output / "autoencoder", dtype=torch.float32)
    model.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    trained = torch.nn.ModuleDict({"decoder": model.decoder, "post_quant_conv": model.post_quant_conv})
    trained.requires_grad_(True).train()

    def loss_of(step: int, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        with torch.no_grad():
            latents = model.encode(images).latent_dist.sample()
        return reconstruction(model.decode(latents).sample, images, 5.0)

    fit(trained, loss_of, Scenes(VAE_DATA_SEED + 2, 16), steps=steps, peak=1e-3, work=work / "decoder")
    model.eval().half().save_pretrained(output / "decoder")


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, count: int = 2000) -> None:
    """Gives every latent channel mean 0 and variance 1 by folding the affine map into the two 1x1 convolutions.

    StableDiffusionPipeline knows one scaling factor and no shift, so the weights must carry the rest.
    """
    scenes, device = Scenes(VAE_DATA_SEED + 1, 100), model.device
    latents = torch.cat([model.encode(scenes[i][0].to(device)).latent_dist.mean for i in range(count // 100)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale, shift = torch.cat([1 / std, torch.ones_like(std)]), torch.cat([-mean / std, -2 * std.log()])
    model.quant_conv.weight.mul_(scale[:, None, None, None])
    model.quant_conv.bias.mul_(scale).add_(shift)
    model.post_quant_conv.bias.add_(model.post_quant_conv.weight[:, :, 0, 0] @ mean)
    model.post_quant_conv.weight.mul_(std[None, :, None, None])
    model.register_to_config(scaling_factor=1.0)


def assemble(output: Path) -> None:
    """Puts the parts together as a StableDiffusionPipeline whose UNet is still untrained."""
    vae = output / ("decoder" if (output / "decoder").is_dir() else "autoencoder")
    text_encoder = CLIPTextModel.from_pretrained(output / "text")
    tokenizer = CLIPTokenizer.from_pretrained(output / "text")
    torch.manual_seed(SEED)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae), text_encoder=text_encoder, tokenizer=tokenizer,
        unet=unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(output / "untrained")  # fmt: skip


def install(output: Path, teacher: Path, assets: Path) -> None:
    """Puts the trained teacher and the evaluator, in fp16, where the package looks for them.

    A decoder that was trained for longer replaces the teacher's: both decode the same latents.
    """
    decoder = output / "decoder"
    own = {"vae": AutoencoderKL.from_pretrained(decoder)} if decoder.is_dir() else {}
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None, feature_extractor=None, **own)
    with replacing(assets / "teacher") as new:
        pipeline.to(torch.float16).save_pretrained(new)
        forget_origin(new)
    with replacing(assets / "clip") as new:
        shutil.copytree(output / "clip", new, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {
        "clip": (make_clip, 1700), "text": (make_text, 500), "autoencoder": (make_autoencoder, 6500),
        "decoder": (make_decoder, 4000),
    }  # fmt: skip
    others = ("assemble", "assemble-flow", "install", "install-flow")
    parser.add_argument("part", choices=(*makers, *others))
    parser.add_argument("--output", type=Path, default=ROOT / "runs/shapes-assets")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/shapes-assets/work")
    parser.add_argument(
        "--steps", type=int, help="default: 1700 (clip), 500 (text), 6500 (autoencoder), 4000 (decoder)"
    )
    parser.add_argument("--teacher", type=Path, default=ROOT / "runs/shapes-teacher/pipeline", help="for install")
    parser.add_argument(
        "--flow", type=Path, default=ROOT / "runs/shapes-flow-teacher/pipeline", help="for install-flow"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.part == "assemble":
        return assemble(args.output)
    if args.part == "install":
        return install(args.output, args.teacher, ROOT / "assets/shapes")
    if args.part == "assemble-flow":
        return flow_teacher.assemble(args.output, SEED)
    if args.part == "install-flow":
        return flow_teacher.install(args.output, args.flow, ROOT / "assets/shapes/flow")
    make, steps = makers[args.part]
    return make(args.work, args.output, args.steps or steps, args.device)


if __name__ == "__main__":
    main()
