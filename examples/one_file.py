"""One-step distillation on a toy, whole, with nothing but torch: read it from top to bottom.

    python examples/one_file.py            # prints a table and writes runs/one_file.png; under a minute on one core

A small network first learns to denoise points in the plane (the teacher). Then a copy of it, the student, learns to
jump from noise to data in a single call, by distribution matching (DMD, arXiv:2311.18828; two time scales as in DMD2,
arXiv:2405.14867): a second copy, the critic, learns what the student's own points look like at every noise level, and
the student follows the difference between what the critic and the teacher believe.

Letters: x0 data, eps noise, t time in [0, 1], x_t = alpha x0 + sigma eps. The toolkit has the same four pieces under
the names Denoiser, Prediction, DMD2 and Trainer; here they are functions.
"""

from __future__ import annotations

import argparse
import copy
import math
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import swa_utils


BATCH = 256
SPREAD = 0.08  # standard deviation of the data around their curve


def curve(u: Tensor) -> Tensor:
    """Three quarters of a spiral's turn, (N,) in [0, 1] => (N, 2)."""
    angle = math.pi * (0.5 + 1.5 * u.sqrt())
    return 1.2 * angle[:, None] / math.pi * torch.stack([angle.cos(), angle.sin()], 1)


def data(count: int) -> Tensor:
    """Points along the spiral, (count, 2)."""
    return curve(torch.rand(count)) + SPREAD * torch.randn(count, 2)


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise at time t (B,): alpha = cos, sigma = sin, each (B, 1)."""
    return (t * math.pi / 2).cos()[:, None], (t * math.pi / 2).sin()[:, None]


class Network(nn.Module):
    """(x_t, t) => v = alpha eps - sigma x0, from which x0 follows without a division (arXiv:2202.00512)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        hidden = [layer for size in (2 + 16, width, width) for layer in (nn.Linear(size, width), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2), (B,) => (B, 2)."""
        angles = t[:, None] * 2.0 ** torch.arange(8) * math.pi / 2
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], 1))


def clean(network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] as the network sees it: alpha x_t - sigma v."""
    alpha, sigma = levels(t)
    return alpha * x_t - sigma * network(x_t, t)


def add_noise(x0: Tensor, t: Tensor) -> Tensor:
    """x_t with fresh noise."""
    alpha, sigma = levels(t)
    return alpha * x0 + sigma * torch.randn_like(x0)


def denoising_loss(network: nn.Module, x0: Tensor) -> Tensor:
    """Squared error of v at a uniform time: trains the teacher on data, and the critic on the student's points."""
    t, eps = torch.rand(len(x0)), torch.randn_like(x0)
    alpha, sigma = levels(t)
    return (network(alpha * x0 + sigma * eps, t) - (alpha * eps - sigma * x0)).square().mean()


@torch.no_grad()
def sample(network: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """DDIM (arXiv:2010.02502): `steps` network calls from noise (B, 2) to points (B, 2)."""
    x_t = noise
    for k in range(steps):
        t, s = torch.full((len(noise),), 1 - k / steps), torch.full((len(noise),), 1 - (k + 1) / steps)
        (alpha, sigma), v = levels(t), network(x_t, t)
        x0, eps = alpha * x_t - sigma * v, sigma * x_t + alpha * v
        alpha, sigma = levels(s)
        x_t = alpha * x0 + sigma * eps
    return x_t


def generate(student: nn.Module, noise: Tensor) -> Tensor:
    """The student's one call: noise at t = 1 => points."""
    return clean(student, noise, torch.ones(len(noise)))


def matching_loss(student: nn.Module, teacher: nn.Module, critic: nn.Module) -> Tensor:
    """A scalar whose gradient at the student's points is DMD's direction (eq. 7 and 8); its value means nothing."""
    x0 = generate(student, torch.randn(BATCH, 2))
    t = 0.02 + 0.96 * torch.rand(BATCH)
    with torch.no_grad():
        x_t = add_noise(x0, t)
        real, fake = clean(teacher, x_t, t), clean(critic, x_t, t)
        direction = (fake - real) / (x0 - real).abs().mean(1, keepdim=True)
    return 0.5 * (x0 - (x0 - direction).detach()).square().mean()


def descend(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One update."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def train_teacher(steps: int) -> nn.Module:
    """A network that denoises the data at every noise level."""
    teacher = Network()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        descend(lambda: denoising_loss(teacher, data(BATCH)), optimizer)
        decay.step()
    return teacher.requires_grad_(False)


def distil(teacher: nn.Module, steps: int, critic_updates: int = 2) -> nn.Module:
    """A student that needs one call; student and critic start as the teacher. Returns the averaged student."""
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    student_optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.0, 0.99))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.0, 0.99))
    average = swa_utils.AveragedModel(student, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.99))
    for _ in range(steps):
        for _ in range(critic_updates):
            with torch.no_grad():
                points = generate(student, torch.randn(BATCH, 2))
            descend(lambda x0=points: denoising_loss(critic, x0), critic_optimizer)
        descend(lambda: matching_loss(student, teacher, critic), student_optimizer)
        average.update_parameters(student)
    return average.module


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|: zero for equal distributions."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - sum(within))


def on_the_curve(points: Tensor) -> float:
    """Share of the points within three standard deviations of the spiral."""
    return float((torch.cdist(points, curve(torch.linspace(0, 1, 1000))).amin(1) < 3 * SPREAD).float().mean())


def draw(panels: list[Tensor], path: Path, side: int = 240) -> None:
    """Scatter plots side by side as a PNG file, written by hand so that torch stays the only library."""
    image = torch.full((side, side * len(panels)), 255, dtype=torch.uint8)
    for number, points in enumerate(panels):
        x, y = ((points.clamp(-2.9, 2.9) + 3) / 6 * side).long().T
        image[side - 1 - y, x + number * side] = 40
        image[:, number * side] = 200
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in image)
    size = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 0, 0, 0, 0)  # 8 bits, grey
    chunks = [b"IHDR" + size, b"IDAT" + zlib.compress(rows), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def main() -> None:
    """Trains, distils, prints the table, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--student-steps", type=int, default=1500)
    parser.add_argument("--picture", type=Path, default=Path("runs/one_file.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are too small for more
    began = time.perf_counter()
    teacher = train_teacher(args.teacher_steps)
    middle = time.perf_counter()
    student = distil(teacher, args.student_steps)
    print(f"teacher {middle - began:.0f} s, distillation {time.perf_counter() - middle:.0f} s")
    real, noise = data(2000), torch.randn(2000, 2)
    made = {
        "data": (0, data(2000)),
        "teacher": (50, sample(teacher, noise, 50)),
        "teacher, 1 call": (1, sample(teacher, noise, 1)),
        "student, 1 call": (1, generate(student, noise).detach()),
    }
    print(f"{'points':16} {'calls':>5} {'energy distance':>16} {'on the curve':>13}")
    for name, (calls, points) in made.items():
        print(f"{name:16} {calls:5} {energy_distance(points, real):16.4f} {on_the_curve(points):13.1%}")
    draw([points for _, points in made.values()], args.picture)
    print(f"{args.picture}: {', '.join(made)}, from left to right")


if __name__ == "__main__":
    main()
