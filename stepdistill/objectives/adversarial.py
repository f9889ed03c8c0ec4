"""The adversarial game on noised samples that several objectives play beside matching: diffusion-GAN.

Wang et al. 2022 (arXiv 2206.02262); DMD2 (arXiv 2405.14867) section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.discriminator import Game, discriminator_loss, generator_loss
from stepdistill.errors import UserError
from stepdistill.losses import taken_early
from stepdistill.objectives.base import Batch
from stepdistill.prediction import add_noise
from stepdistill.times import LogNoise, drawn_times


if TYPE_CHECKING:
    from stepdistill.cast import Cast


@dataclass(frozen=True)
class Adversary:
    """Student against discriminator, both looking at noised samples through a denoiser's features.

    Attributes:
        game: the loss.
        features: the role whose features the head "discriminator" sees.
        r1_weight: of the approximate R1 term, relative to the classification term.
        r1_std: standard deviation of its perturbation of the clean samples.
        shared_noise: whether real and generated samples are seen at the same times and through the same noise.
        log_noise: mean and deviation of a normal density of log(sigma / alpha) at which they are seen; for a flow that
            is the logit-normal density of its noise level. None: uniform times.
        t_min: the lowest of the uniform times, as a fraction.
        t_max: the highest of them.
        misaligned_weight: of a second game, real samples against the same ones with each other's prompts, which
            teaches the discriminator what a prompt asks for; the code of SANA-Sprint (arXiv 2503.09641) has it as an
            option. 0 for none.
    """

    game: Game = "non_saturating"
    features: str = "critic"
    r1_weight: float = 0.0
    r1_std: float = 0.1
    shared_noise: bool = False
    log_noise: LogNoise | None = None
    t_min: float = 0.0
    t_max: float = 1.0
    misaligned_weight: float = 0.0

    @property
    def student_needs_images(self) -> bool:
        """Whether the student's own turn compares with real samples."""
        return self.game == "relativistic"

    def encoder(self, cast: Cast) -> Denoiser:
        """Whose features the head sees: the role's own, also where another one stands in for it as a target."""
        return cast.denoiser(self.features, renamed=False)

    def discriminator_terms(self, cast: Cast, x0: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of the discriminator's turn, unweighted.

        Args:
            cast: with the head "discriminator".
            x0: the student's samples for the batch's prompts, (B, C, H, W); detached here.
            batch: of the images stream.
        """
        assert batch.latents is not None, "the images stream carries latents"
        denoiser = self.encoder(cast)
        real, fake = batch.latents, x0.detach()
        # DMD2's code draws time and noise for real and generated samples on their own, SiD's shares them.
        real_logits, at = self._logits(cast, denoiser, real, batch)
        fake_logits, _ = self._logits(cast, denoiser, fake, batch, at if self.shared_noise else None)
        terms = {"discriminator": discriminator_loss(real_logits, fake_logits, self.game)}
        if self.r1_weight > 0:
            # Approximate R1: the logit must not change under a small change of the real sample, seen at the same time
            # and through the same noise; |D(x + s n) - D(x)|^2 is about s^2 |grad D|^2.
            near = real + self.r1_std * torch.randn_like(real)
            moved, _ = self._logits(cast, denoiser, near, batch, at)
            terms["r1"] = self.r1_weight * (moved - real_logits).square().mean()
        if self.misaligned_weight > 0:
            if len(real) < 2:
                raise UserError("misaligned_weight: a single sample has no other's prompt to be shown with; let every "
                                "micro-batch of a process have two, or set misaligned_weight: 0")  # fmt: skip
            # Every row gets its neighbour's prompt; at the same times and noise nothing else tells the two apart.
            wrong = replace(batch, condition=batch.condition[torch.arange(len(real), device=real.device).roll(1)])
            wrong_logits, _ = self._logits(cast, denoiser, real, wrong, at)
            terms["misaligned"] = self.misaligned_weight * discriminator_loss(real_logits, wrong_logits, self.game)
        return terms

    def student_term(self, cast: Cast, x0: Tensor, batch: Batch) -> Tensor:
        """The adversarial loss of the student's samples; its graph reaches x0 without holding the denoiser's.

        The gradient with respect to the samples is taken at once, so that the features' graph is freed before the
        student's backward pass.
        """
        denoiser = self.encoder(cast)

        def loss_of(sample: Tensor) -> Tensor:
            fake, at = self._logits(cast, denoiser, sample, batch)
            real = None
            if self.student_needs_images:
                assert batch.latents is not None, "the images stream carries latents"
                with torch.no_grad():
                    seen = at if self.shared_noise else None
                    real, _ = self._logits(cast, denoiser, batch.latents, batch, seen)
            return generator_loss(fake, self.game, real)

        return taken_early(x0, loss_of)

    def _logits(
        self, cast: Cast, denoiser: Denoiser, x0: Tensor, batch: Batch, at: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Clean samples => logits (B, L) at a random time, and that time with its noise."""
        if at is None:
            at = self._times(denoiser, x0), torch.randn_like(x0)
        t, eps = at
        head = cast.head("discriminator")
        return head(denoiser, add_noise(denoiser.schedule, x0, t, eps), t, batch.condition), at

    def _times(self, denoiser: Denoiser, x0: Tensor) -> Tensor:
        """Where the samples are seen, (B,)."""
        return drawn_times(denoiser.schedule, len(x0), low=self.t_min, high=self.t_max, log_noise=self.log_noise,
                           device=x0.device)  # fmt: skip
