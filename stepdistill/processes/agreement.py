"""Whether all processes hold the same weights, bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hexadecimal) of names and bits."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_agreement(accelerator: Accelerator, roles: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compares the processes' weights; every process has to call it.

    Args:
        accelerator: knows the processes.
        roles: whole tensors by role and name.

    Raises:
        RuntimeError: they differ. No user can cause that: a gradient was not averaged, or a device computes wrongly.
    """
    if accelerator.num_processes == 1:
        return
    everyone = gather_object([{role: digest(tensors) for role, tensors in roles.items()}])
    for rank, found in enumerate(everyone):
        wrong = [role for role in roles if found[role] != everyone[0][role]]
        if wrong:
            raise RuntimeError(f"process {rank} has other weights than process 0 for {', '.join(wrong)}: a gradient "
                               "was not averaged over the processes, or one of the devices computes wrongly; no "
                               "checkpoint is written of that")  # fmt: skip
