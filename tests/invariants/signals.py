"""Signals that reach a trainer at a known iteration."""

from __future__ import annotations

import os
import signal

from stepdistill.trainer import Progress, Trainer


def terminate_at(trainer: Trainer, step: int) -> None:
    """The trainer's process gets SIGTERM as soon as so many iterations are done."""

    def interrupt(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.on_step = interrupt
