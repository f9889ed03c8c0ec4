"""What a run keeps of itself beyond the weights that are trained, and what it says when the disk is full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.cast import Cast
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.base import Batch, Frozen, Head, InferenceSpec, Loss, Phase, Role, Step, Trained
from tests.tiny import LORA, trainer_of


class Mean(torch.nn.Module):
    """A head with nothing to train, which notes what it has seen."""

    seen: Tensor

    def __init__(self, shapes: Sequence[Any]) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            self.seen += features[0].abs().mean()
        return features[0].mean()


class Seeing:
    """A student that is trained while a head looks on."""

    def roles(self) -> dict[str, Role]:
        return {"teacher": Frozen(), "student": Trained(), "head": Head(Mean)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", ("student",), self.loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        return None

    def inference(self) -> InferenceSpec:
        return InferenceSpec((999,))

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        t = torch.full((len(batch),), 0.5, dtype=torch.float64)
        x = batch.noise()
        with torch.no_grad():
            cast.head("head")(cast.denoiser("teacher"), x, t, batch.condition)
        return Loss({"student": cast.denoiser("student")(x, t, batch.condition).native.square().mean()})


def test_what_a_head_without_parameters_noted_is_in_the_checkpoint_and_comes_back(
    sd_folder: str, tmp_path: Path
) -> None:
    trainer = trainer_of(load_family(sd_folder), Seeing(), lora={"student": LORA}, folder=tmp_path)
    trainer.run()
    seen = trainer.cast.tensors("head")["seen"].item()
    assert seen > 0
    again = trainer_of(load_family(sd_folder), Seeing(), lora={"student": LORA})
    assert trainer.checkpoints is not None
    again.resume(*trainer.checkpoints.load(trainer.checkpoints.steps()[-1]))
    assert again.cast.tensors("head")["seen"].item() == seen


def test_a_full_disk_while_logging_is_a_users_error_that_says_how_to_go_on(sd_folder: str, tmp_path: Path) -> None:
    trainer = trainer_of(load_family(sd_folder), Seeing(), lora={"student": LORA})
    trainer.log = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full could not be written \(No space left on device\); "):
        trainer.run()
