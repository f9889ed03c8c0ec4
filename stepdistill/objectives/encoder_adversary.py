"""An adversary with an encoder of its own: it judges where a student's step along the trajectory ended.

Lin, Wang and Yang 2024, "SDXL-Lightning: Progressive Adversarial Diffusion Distillation", arXiv 2402.13929, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.discriminator import Discriminator, Game, discriminator_loss, generator_loss
from stepdistill.errors import UserError
from stepdistill.losses import taken_early
from stepdistill.objectives.base import Batch, FeatureShape, Head, Role, Trained


if TYPE_CHECKING:
    from stepdistill.cast import Cast


Start = tuple[Tensor, Tensor]  # where a step began: x_t, (B, C, H, W), and t, (B,)


@dataclass(frozen=True)
class EncoderAdversary:
    """Student against discriminator, whose features are those of a network that is trained with it.

    The encoder begins as the teacher. If the game is conditional, it also sees where the step began, so a sample that
    is likely but not the one that this start leads to is told apart: the student has to keep the teacher's path.

    Attributes:
        conditional: whether the discriminator sees the start.
        game: the loss; not "relativistic", which compares with real samples in the student's turn.
        layers: modules whose outputs are the features; empty: the family's own choice, the bottleneck of a UNet.
    """

    conditional: bool = True
    game: Game = "non_saturating"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.game == "relativistic":
            raise UserError("the relativistic game does not go with a trained encoder; "
                            "use non_saturating, hinge or least_squares")  # fmt: skip

    def roles(self) -> Mapping[str, Role]:
        """The encoder and the head on its features; both are updated in the discriminator's turn."""
        build = of_two if self.conditional else Discriminator
        return {"encoder": Trained(), "discriminator": Head(build, self.layers)}

    def discriminator_term(
        self, cast: Cast, start: Start | None, real: Tensor, fake: Tensor, at: Tensor, batch: Batch
    ) -> Tensor:
        """The loss of discriminator and encoder, a scalar; -log p - log(1 - p_fake) for the non-saturating game.

        Args:
            cast: with the roles of `roles`.
            start: where the steps began, (x_t, t); None only if the game is not conditional.
            real: where the teacher's steps ended, (B, C, H, W).
            fake: where the student's steps ended, (B, C, H, W); detached here.
            at: the time of both, (B,).
            batch: of which they were made.
        """
        seen, times = [real, fake.detach()], [at, at]
        if self.conditional:
            x_t, t = _known(start)
            seen, times = [*seen, x_t], [*times, t]
        # One pass for all; the start, which is the same for both, is encoded once.
        condition = Condition.cat([batch.condition] * len(seen))
        features = self._features(cast, torch.cat(seen), torch.cat(times), condition)
        parts = [feature.chunk(len(seen)) for feature in features]
        begun = [part[2] for part in parts] if self.conditional else None
        real_logits, fake_logits = (self._logits(cast, [part[row] for part in parts], begun) for row in (0, 1))
        return discriminator_loss(real_logits, fake_logits, self.game)

    def student_term(self, cast: Cast, start: Start | None, fake: Tensor, at: Tensor, batch: Batch) -> Tensor:
        """The student's loss, a scalar; -log p_fake for the non-saturating game.

        Its gradient with respect to the samples is taken at once, so that the encoder's graph is freed before the
        student's backward pass; arguments as above.
        """
        begun = None
        if self.conditional:
            with torch.no_grad():
                begun = self._features(cast, *_known(start), batch.condition)

        def loss_of(x: Tensor) -> Tensor:
            return generator_loss(self._logits(cast, self._features(cast, x, at, batch.condition), begun), self.game)

        return taken_early(fake, loss_of)

    def _features(self, cast: Cast, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        return cast.denoiser("encoder").features(x, t, condition, cast.head("discriminator").layers)

    def _logits(self, cast: Cast, ended: Sequence[Tensor], begun: Sequence[Tensor] | None) -> Tensor:
        """Features of the end, and of the start if it is seen => logits, (B, L)."""
        features = ended if begun is None else [_joined(a, b) for a, b in zip(ended, begun, strict=True)]
        logits: Tensor = cast.head("discriminator").module([feature.float() for feature in features])
        return logits


def of_two(shapes: Sequence[FeatureShape]) -> nn.Module:
    """The discriminator on features of `shapes`, with the channels of two places side by side."""
    return Discriminator([(2 * s[0], *s[1:]) if len(s) == 3 else (*s[:-1], 2 * s[-1]) for s in shapes])


def _joined(end: Tensor, start: Tensor) -> Tensor:
    """Features side by side: maps (B, C, H, W) by their second axis, tokens (B, N, C) by their last."""
    return torch.cat([end, start], dim=1 if end.ndim == 4 else -1)


def _known(start: Start | None) -> Start:
    assert start is not None, "a conditional game is told where the steps began"
    return start
