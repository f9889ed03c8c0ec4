"""Sample grids during training: the same noise through teacher and student, and what the denoisers say of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.families.base import ModelFamily
from stepdistill.files import why, write_whole
from stepdistill.objectives.base import InferenceSpec
from stepdistill.prediction import add_noise
from stepdistill.sampling import ddim, student_samples
from stepdistill.seeds import own_randomness
from stepdistill.times import grid, trailing


@dataclass
class Previews:
    """Makes one grid per call: rows teacher and student, and with a critic triptychs; a column per prompt.

    Attributes:
        family: encodes and decodes.
        prompts: one column each.
        spec: how the student is sampled; None: as the teacher.
        folder: where the grids go; None keeps nothing: some processes only help networks that are divided among all.
        seed: of the noise, the same for all rows and grids.
        teacher_steps: DDIM steps of the teacher's row.
        guidance: the teacher's guidance scale.
        critic_scale: that at which the critic knows the student.
        size: pixel size, None for the teacher's own.
        rows: at most so many samples at once, as in training; None: all.
        triptych_level: how far the student's samples are noised for teacher and critic, 0 to 1.
    """

    family: ModelFamily
    prompts: Sequence[str]
    spec: InferenceSpec | None
    folder: Path | None
    seed: int = 0
    teacher_steps: int = 25
    guidance: float = 3.0
    critic_scale: float = 1.0
    size: int | None = None
    rows: int | None = None
    triptych_level: float = 0.6
    _teacher_row: Tensor | None = None

    @torch.no_grad()
    def write(
        self, student: Denoiser, teacher: Denoiser | None, step: int, critic: Denoiser | None = None
    ) -> Path | None:
        """=> previews/step-*.png. The teacher's row is made once; without a teacher there is only the student's.

        A grid that cannot be written is a warning, and None.

        With a critic, the student's row becomes the first of a triptych: below it, the clean images that teacher and
        critic see in the student's noised samples. Where these two differ is where the student is sent.
        """
        with own_randomness(self.seed, self.family.device):
            noise = torch.randn(len(self.prompts), *self.family.latent_shape(self.size)).to(self.family.device)
            if teacher is not None and self._teacher_row is None:
                self._teacher_row = self._decode(self._in_parts(self._many_steps, teacher, noise))
            x0 = self._in_parts(self._few_steps, student, noise)
            rows = {} if self._teacher_row is None else {"teacher": self._teacher_row}
            rows["student"] = self._decode(x0)
            if teacher is not None and critic is not None:
                rows |= self._guesses(x0, teacher, critic)
        if self.folder is None:
            return None
        return self._save(labelled_grid(rows, self.prompts), self.folder / f"step-{step:07d}.png")

    def _save(self, picture: Image.Image, path: Path) -> Path | None:
        """=> the file; None if there is no room for it, since the checkpoint of this step is still to be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda new: picture.save(new, format="png"))
        except OSError as error:
            text = f"{path} could not be written ({why(error)}); the run goes on without this preview"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            return None
        return path

    def _parts(self) -> list[slice]:
        rows = self.rows or len(self.prompts)
        return [slice(start, start + rows) for start in range(0, len(self.prompts), rows)]

    def _in_parts(
        self, sample: Callable[[Denoiser, Tensor, Sequence[str]], Tensor], denoiser: Denoiser, noise: Tensor
    ) -> Tensor:
        return torch.cat([sample(denoiser, noise[part], self.prompts[part]) for part in self._parts()])

    def _few_steps(self, student: Denoiser, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.spec is None:
            return self._many_steps(student, noise, prompts)
        return student_samples(student, noise, self.family.encode_prompts(prompts), self.spec)

    def _many_steps(self, denoiser: Denoiser, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        times = grid(denoiser.schedule, trailing(denoiser.schedule, self.teacher_steps), noise.device)
        condition = self.family.encode_prompts(prompts)
        null = self.family.null_condition(len(prompts))
        return ddim(denoiser, noise, times, condition, null=null, guidance=self.guidance)

    def _guesses(self, x0: Tensor, teacher: Denoiser, critic: Denoiser) -> dict[str, Tensor]:
        """The other two parts of the triptychs of x0, (B, C, H, W)."""
        index = round(self.triptych_level * teacher.schedule.num_train_timesteps) - 1
        t = grid(teacher.schedule, (index,), x0.device).expand(len(x0))
        x_t = add_noise(teacher.schedule, x0, t, torch.randn(x0.shape).to(x0))
        seen, drawn = [], []
        for part in self._parts():
            condition = self.family.encode_prompts(self.prompts[part])
            null = self.family.null_condition(len(self.prompts[part]))
            seen.append(teacher.guided(x_t[part], t[part], condition, null, self.guidance).x0)
            drawn.append(critic.guided(x_t[part], t[part], condition, null, self.critic_scale).x0)
        guesses = {"teacher's x0": torch.cat(seen), "critic's x0": torch.cat(drawn)}
        return {name: self._decode(guess) for name, guess in guesses.items()}

    def _decode(self, latents: Tensor) -> Tensor:
        # One image at a time and in full precision: decoders are large, and some overflow in half precision.
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self.family.decode_latents(one).cpu() for one in latents.unsqueeze(1)])


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] => Pillow image."""
    return Image.fromarray((image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def labelled_grid(rows: dict[str, Tensor], captions: Sequence[str], cell: int = 128) -> Image.Image:
    """Rows of images (B, 3, H, W) with their names at the left and the captions above the columns.

    Args:
        rows: images of one size, by name.
        captions: of the columns.
        cell: the longer side of a picture, in pixels.
    """
    margin, head, pad = 76, 48, 4
    sides = next(iter(rows.values())).shape[-2:] if rows else (1, 1)
    tall, wide = (max(1, round(cell * side / max(sides))) for side in sides)
    canvas = Image.new("RGB", (margin + len(captions) * (wide + pad), head + len(rows) * (tall + pad)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for column, caption in enumerate(captions):
        draw.multiline_text((margin + column * (wide + pad), 2), wrap(caption, 21), fill="black", font=font, spacing=1)
    for line, (name, images) in enumerate(rows.items()):
        top = head + line * (tall + pad)
        draw.text((4, top + tall // 2 - 6), name, fill="black", font=font)
        for column, image in enumerate(images):
            picture = to_pil(image).resize((wide, tall), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + column * (wide + pad), top))
    return canvas


def wrap(text: str, width: int, lines: int = 3) -> str:
    """Breaks a caption into at most `lines` lines; the rest is cut with three dots."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="..."))
