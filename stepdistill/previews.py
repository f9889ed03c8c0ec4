"""Sample grids during training: the same noise through teacher and student, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import InferenceSpec
from stepdistill.sampling import ddim, stochastic
from stepdistill.times import grid


@dataclass
class Previews:
    """Makes one grid per call: rows teacher and student, a column per prompt.

    Attributes:
        family: encodes and decodes.
        prompts: one column each.
        spec: how the student is sampled; None: as the teacher.
        folder: where the grids go.
        seed: of the noise, the same for both rows and all grids.
        teacher_steps: DDIM steps of the teacher's row.
        guidance: the teacher's guidance scale.
        size: pixel size, None for the teacher's own.
    """

    family: ModelFamily
    prompts: Sequence[str]
    spec: InferenceSpec | None
    folder: Path
    seed: int = 0
    teacher_steps: int = 25
    guidance: float = 3.0
    size: int | None = None
    _teacher_row: Tensor | None = None

    @torch.no_grad()
    def write(self, student: Denoiser, teacher: Denoiser | None, step: int) -> Path:
        """=> previews/step-*.png. The teacher's row is made once; without a teacher there is only the student's."""
        state = torch.get_rng_state()  # pictures must not change what is trained afterwards
        torch.manual_seed(self.seed)
        noise = torch.randn(len(self.prompts), *self.family.latent_shape(self.size)).to(self.family.device)
        condition = self.family.encode_prompts(self.prompts)
        if teacher is not None and self._teacher_row is None:
            self._teacher_row = self._many_steps(teacher, noise)
        if self.spec is None:
            row = self._many_steps(student, noise)
        else:
            times = grid(student.schedule, self.spec.timesteps, noise.device)
            row = self.family.decode_latents(stochastic(student, noise, times, condition)).cpu()
        torch.set_rng_state(state)
        rows = {"teacher": self._teacher_row, "student": row}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:07d}.png"
        labelled_grid({name: images for name, images in rows.items() if images is not None}, self.prompts).save(path)
        return path

    def _many_steps(self, denoiser: Denoiser, noise: Tensor) -> Tensor:
        total = denoiser.schedule.num_train_timesteps
        indices = tuple(round(total * (1 - i / self.teacher_steps)) - 1 for i in range(self.teacher_steps))
        condition = self.family.encode_prompts(self.prompts)
        null = self.family.null_condition(len(self.prompts))
        x0 = ddim(denoiser, noise, grid(denoiser.schedule, indices, noise.device), condition,
                  null=null, guidance=self.guidance)  # fmt: skip
        return self.family.decode_latents(x0).cpu()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] => Pillow image."""
    return Image.fromarray((image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def labelled_grid(rows: dict[str, Tensor], captions: Sequence[str], cell: int = 128) -> Image.Image:
    """Rows of images (B, 3, H, W) with their names at the left and the captions above the columns."""
    margin, head, pad = 64, 48, 4
    canvas = Image.new("RGB", (margin + len(captions) * (cell + pad), head + len(rows) * (cell + pad)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for column, caption in enumerate(captions):
        draw.multiline_text((margin + column * (cell + pad), 2), wrap(caption, 21), fill="black", font=font, spacing=1)
    for line, (name, images) in enumerate(rows.items()):
        top = head + line * (cell + pad)
        draw.text((4, top + cell // 2 - 6), name, fill="black", font=font)
        for column, image in enumerate(images):
            picture = to_pil(image).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + column * (cell + pad), top))
    return canvas


def wrap(text: str, width: int, lines: int = 3) -> str:
    """Breaks a caption into at most `lines` lines; the rest is cut with three dots."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="..."))
