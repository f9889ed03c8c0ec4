"""What the commands share: the console, quiet libraries, and the device that a word means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.errors import UserError, first_line


if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, quiet: bool = False) -> Console:
    """Where progress and tables go."""
    from rich.console import Console

    return Console(quiet=quiet)


def hide_loading_bars() -> None:
    """Our own bars say what is going on; those of the libraries, one per component, would bury them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def device_of(name: str) -> str:
    """auto, cpu, cuda, cuda:1 ... => a device of torch.

    Raises:
        UserError: torch sees no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}; use auto, cpu or cuda") from error
    return name
