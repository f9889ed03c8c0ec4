"""Whether a run is well: cheap measures of the student beside its teacher on a fixed probe, and when to stop.

The monitor knows the names "teacher", "student" and "critic" (a trained denoiser of what the student makes) and takes
from the objective's roles which of them there are; it knows no method.

Letters: B samples of the probe, ordered by prompt; S samples of one prompt; C, H, W of latents. Images are
(B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import split
from stepdistill.objectives.base import InferenceSpec, Objective, Trained, critic_scale_of
from stepdistill.prediction import Prediction, add_noise, native_target
from stepdistill.sampling import ddim, student_samples
from stepdistill.seeds import own_randomness
from stepdistill.times import grid, trailing


if TYPE_CHECKING:
    from stepdistill.cast import Cast
    from stepdistill.families.base import ModelFamily


LOWEST, HIGHEST = 0.02, 0.98  # times at which critic and teacher are compared; DMD's range (arXiv 2311.18828)
TINY = 1e-6  # a teacher without any contrast or diversity must not make a ratio infinite


@dataclass(frozen=True)
class HealthSettings:
    """What is measured, how often, and what stops a run.

    A limit is relative to the teacher and to the best that the run has shown so far: a student may start far from its
    teacher, and that is no collapse. None switches a limit off.

    Attributes:
        every: iterations between two measurements.
        prompts: of the probe.
        samples: of each prompt, S >= 2, each from noise of its own.
        seed: of the probe's noise.
        teacher_steps: DDIM steps of the teacher's samples, which are made once.
        grace: iterations of a stage in which contrast, diversity, mean and saturation are not judged: vague pictures
            and swinging colours are a usual beginning.
        patience: so many bad measurements in a row stop the run; at a stage's last iteration one does.
        min_contrast: least contrast, as a share of the teacher's or of the run's best, whichever is less.
        min_diversity: least diversity, as a share of the same.
        max_scale: largest size of the latents, as a multiple of the teacher's or of the run's least, whichever is
            more.
        max_drift: how far mean or saturation may go away from the teacher's, beyond the nearest that they have been.
        max_critic_ratio: largest ratio of the critic's error to the teacher's, as a multiple of 1 or of the run's
            least, whichever is more.
    """

    every: int = 100
    prompts: int = 4
    samples: int = 2
    seed: int = 0
    teacher_steps: int = 25
    grace: int = 200
    patience: int = 3
    min_contrast: float | None = 0.05
    min_diversity: float | None = 0.02
    max_scale: float | None = 10.0
    max_drift: float | None = 0.3
    max_critic_ratio: float | None = 4.0


# ---- measures ------------------------------------------------------------------------------------------------------


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the brightness within an image, mean over images; 0 for plain areas."""
    return images.mean(1).flatten(1).std(1, correction=0).mean()


def saturation(images: Tensor) -> Tensor:
    """Largest minus smallest of the three colours, mean over pixels; 0 for grey, 1 for pure colours."""
    return (images.amax(1) - images.amin(1)).mean()


def diversity(images: Tensor, samples: int) -> Tensor:
    """Root mean squared difference between two images of one prompt, mean over pairs; 0 if the noise does nothing.

    Args:
        images: (B, 3, H, W), the S of one prompt side by side.
        samples: S.
    """
    groups = images.reshape(-1, samples, images[0].numel())
    # the faster way by a matrix product finds small distances between equal rows
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum((1, 2)).mean() / (samples * (samples - 1)) / math.sqrt(groups.shape[-1])


def appearance(latents: Tensor, images: Tensor, samples: int) -> dict[str, Tensor]:
    """What a set of samples looks like, five scalars; `scale` is the root mean square of the latents (B, C, H, W)."""
    return {
        "mean": images.mean(),
        "contrast": contrast(images),
        "saturation": saturation(images),
        "diversity": diversity(images, samples),
        "scale": root_mean_square(latents),
    }


def drift(own: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """Two appearances => differences of mean and saturation, ratios of contrast, diversity and scale."""
    differences = {name: own[name] - teacher[name] for name in ("mean", "saturation")}
    return differences | {n: own[n] / max(teacher[n], TINY) for n in ("contrast", "diversity", "scale")}


def denoising_error(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), in v = alpha eps - sigma x0: there no noise level dwarfs the others.

    Args:
        prediction: of x_t = alpha x0 + sigma eps.
        x0: clean samples, (B, C, H, W).
        eps: their noise, the same shape.
    """
    target = native_target("v_prediction", x0, eps, prediction.levels)
    return (prediction.v - target).square().flatten(1).mean(1)


def root_mean_square(x: Tensor) -> Tensor:
    """Size of one element, over everything."""
    return x.float().square().mean().sqrt()


# ---- judgement -----------------------------------------------------------------------------------------------------


def improve(best: Mapping[str, float], measures: Mapping[str, float]) -> dict[str, float]:
    """The best that the run has shown: most contrast and diversity, and the least of everything else."""
    new = dict(best)
    for name, value in measures.items():
        if math.isfinite(value):
            more = name in ("contrast", "diversity")
            new[name] = max(new.get(name, value), value) if more else min(new.get(name, abs(value)), abs(value))
    return new


def allowed(settings: HealthSettings, best: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """=> (least, most) by measure, for those that have a limit."""
    found = {}
    for name, floor in (("contrast", settings.min_contrast), ("diversity", settings.min_diversity)):
        if floor is not None:
            found[name] = (floor * min(1.0, best.get(name, 1.0)), math.inf)
    for name, factor in (("scale", settings.max_scale), ("critic_ratio", settings.max_critic_ratio)):
        if factor is not None:
            found[name] = (0.0, factor * max(1.0, best.get(name, 1.0)))
    if settings.max_drift is not None:
        for name in ("mean", "saturation"):
            most = settings.max_drift + best.get(name, 0.0)
            found[name] = (-most, most)
    return found


def find_doubts(measures: Mapping[str, float], best: Mapping[str, float], settings: HealthSettings) -> tuple[str, ...]:
    """What is wrong with a measurement, a text for each measure that is beyond its limit or not finite."""
    bounds = allowed(settings, best)
    found = []
    for name, value in measures.items():
        least, most = bounds.get(name, (-math.inf, math.inf))
        if not math.isfinite(value):
            found.append(f"{name} is not finite")
        elif value < least:
            found.append(f"{name} {value:.3g} is below {least:.3g}")
        elif value > most:
            found.append(f"{name} {value:.3g} is above {most:.3g}")
    return tuple(found)


# ---- the monitor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What every measurement looks at.

    Attributes:
        condition: B rows, each prompt S times in a row.
        null: the unconditional condition, B rows.
        noise: where the samples start from, (B, C, H, W).
        eps: the noise that is added to finished samples, the same shape.
        levels: (B,), 0 to 1: where between the lowest and the highest time each row is compared.
    """

    condition: Condition
    null: Condition
    noise: Tensor
    eps: Tensor
    levels: Tensor

    def chunks(self, rows: int) -> list[Probe]:
        """The same in parts of at most so many rows."""
        cuts = [slice(start, start + rows) for start in range(0, len(self.noise), rows)]
        return [Probe(self.condition[c], self.null[c], self.noise[c], self.eps[c], self.levels[c]) for c in cuts]


def make_probe(
    family: ModelFamily, prompts: Sequence[str], *, samples: int, seed: int, size: int | None = None
) -> Probe:
    """A probe of a few prompts, from a generator of its own."""
    count = len(prompts) * samples
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that devices agree
    shape = (2, count, *family.latent_shape(size))
    noise, eps = torch.randn(shape, generator=generator).to(family.device)
    repeated = torch.arange(len(prompts), device=family.device).repeat_interleave(samples)
    condition = family.encode_prompts(prompts).to(family.device)[repeated]
    null = family.null_condition(1).to(family.device)[torch.zeros_like(repeated)]
    return Probe(condition, null, noise, eps, (torch.arange(count) + 0.5) / count)


@dataclass
class Monitor:
    """Measures one stage's student, and says when it has collapsed.

    Attributes:
        cast: the networks.
        family: decodes latents.
        probe: what is looked at.
        spec: how the student is called.
        settings: how often, and the limits.
        has_critic: whether the game trains one.
        guidance: the teacher's guidance scale.
        critic_scale: that at which the critic knows the student, see `GuidesCritic`.
        rows: at most so many samples go through a network at once.
        agree: makes several processes' numbers the same, so that all of them stop or none does.
        best: the best of every measure so far; all that a resumed run has to be told.
        latest: the last measurement, empty before the first.
        doubts: what was wrong with it.
        strikes: bad measurements in a row.
    """

    cast: Cast
    family: ModelFamily
    probe: Probe
    spec: InferenceSpec
    settings: HealthSettings
    has_critic: bool = True
    guidance: float = 3.0
    critic_scale: float = 1.0
    rows: int = 8
    agree: Callable[[Tensor], Tensor] = lambda values: values
    best: dict[str, float] = field(default_factory=dict, init=False)
    latest: dict[str, float] = field(default_factory=dict, init=False)
    doubts: tuple[str, ...] = field(default=(), init=False)
    strikes: int = field(default=0, init=False)
    _teacher: dict[str, float] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, cast: Cast, objective: Objective, prompts: Sequence[str], settings: HealthSettings,
        *, size: int | None = None, **options: Any,
    ) -> Monitor | None:  # fmt: skip
        """The monitor of a game; None where there is no teacher to compare with, or the student takes many steps."""
        roles, spec = objective.roles(), objective.inference()
        if spec is None or not {"teacher", "student"} <= roles.keys():
            return None
        chosen = prompts[: settings.prompts]
        probe = make_probe(cast.family, chosen, samples=settings.samples, seed=settings.seed, size=size)
        has_critic = isinstance(roles.get("critic"), Trained)
        scale = critic_scale_of(objective)
        return cls(cast, cast.family, probe, spec, settings, has_critic, critic_scale=scale, **options)

    def begin(self) -> None:
        """Measures the teacher, and the student as it starts unless `load_state` told what the run has shown."""
        self._measure_teacher()
        if not self.best:
            self.best = improve({}, self.measure())

    def examine(self, step: int) -> dict[str, float]:
        """Measures the student after `step` iterations and judges it => the measures by name."""
        self.latest = self.measure()
        self.best = improve(self.best, self.latest)
        settings = self.settings
        if step <= settings.grace:
            settings = replace(settings, min_contrast=None, min_diversity=None, max_drift=None)
        self.doubts = find_doubts(self.latest, self.best, settings)
        self.strikes = self.strikes + 1 if self.doubts else 0
        return self.latest

    def has_collapsed(self, *, last: bool) -> bool:
        """Whether the run is to stop; `last` where no later measurement can confirm this one."""
        return self.strikes >= (1 if last else self.settings.patience)

    def summary(self) -> str:
        """The last measurement in one line."""
        return ", ".join(f"{name} {value:.3g}" for name, value in self.latest.items())

    def diagnosis(self) -> str:
        """What is wrong, from which measures, and what helps, in one line."""
        return (f"the student has collapsed: {', '.join(self.doubts)}, in {self.strikes} measurement(s) in a row. "
                f"Measured: {self.summary()}. Lower the learning rate or the guidance, or let the critic learn more "
                "often than the student; docs/health.md says what each measure means.")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know. Checkpoints are written of healthy students only, so no strikes."""
        return {"best": dict(self.best)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self.best = dict(state["best"])

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The student's samples beside the teacher's, and both denoisers on them => measures by name.

        Names: mean, saturation (student minus teacher), contrast, diversity, scale (student / teacher); with a critic
        also critic_error, teacher_error, critic_ratio, and direction: the root mean squared difference of the critic's
        and the guided teacher's clean predictions, in units of the teacher's scale.
        """
        device = self.probe.noise.device
        with own_randomness(self.settings.seed, device):
            parts = self.probe.chunks(self.rows)
            samples = [self._sample(part) for part in parts]
        values = self._appearance(torch.cat(samples))
        if self.has_critic:
            compared = [self._compare(part, x0) for part, x0 in zip(parts, samples, strict=True)]
            critic, teacher, gap = torch.cat(compared, 1).mean(1)
            values |= {"critic_error": critic, "teacher_error": teacher, "direction": gap.sqrt()}
        own = self._agreed(values)
        measures = drift(own, self._teacher)
        if self.has_critic:
            measures |= {name: own[name] for name in ("critic_error", "teacher_error")}
            measures["critic_ratio"] = own["critic_error"] / max(own["teacher_error"], TINY)
            measures["direction"] = own["direction"] / max(self._teacher["scale"], TINY)
        return measures

    @torch.no_grad()
    def _measure_teacher(self) -> None:
        teacher = self.cast.denoiser("teacher")
        indices = trailing(teacher.schedule, self.settings.teacher_steps)
        times = grid(teacher.schedule, indices, self.probe.noise.device)
        samples = [
            ddim(teacher, part.noise, times, part.condition, null=part.null, guidance=self.guidance)
            for part in self.probe.chunks(self.rows)
        ]
        self._teacher = self._agreed(self._appearance(torch.cat(samples)))

    def _sample(self, part: Probe) -> Tensor:
        return student_samples(self.cast.denoiser("student"), part.noise, part.condition, self.spec)

    def _compare(self, part: Probe, x0: Tensor) -> Tensor:
        """=> (3, B): critic's error, teacher's error, squared difference of their clean predictions."""
        teacher, critic = self.cast.denoiser("teacher"), self.cast.denoiser("critic")
        total = teacher.schedule.num_train_timesteps
        fractions = LOWEST + (HIGHEST - LOWEST) * part.levels
        indices = (fractions * total).round().long().clamp(max=total - 1).tolist()
        t = grid(teacher.schedule, tuple(indices), x0.device)
        x_t = add_noise(teacher.schedule, x0, t, part.eps)
        # With and without the prompt in one call: the error is the plain teacher's, the direction the guided one's.
        both = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat([part.condition, part.null]))
        real, without = split(both, len(x_t))
        fake = critic.guided(x_t, t, part.condition, part.null, self.critic_scale)
        gap = (fake.x0 - real.guide(without, self.guidance).x0).square().flatten(1).mean(1)
        return torch.stack([denoising_error(fake, x0, part.eps), denoising_error(real, x0, part.eps), gap])

    def _appearance(self, latents: Tensor) -> dict[str, Tensor]:
        # One image at a time and in full precision: decoders are large, and some overflow in half precision.
        with torch.autocast(latents.device.type, enabled=False):
            images = torch.cat([self.family.decode_latents(one).float() for one in latents.unsqueeze(1)])
        return appearance(latents, images, self.settings.samples)

    def _agreed(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        together = self.agree(torch.stack([value.float() for value in values.values()]))
        return dict(zip(values, together.tolist(), strict=True))
