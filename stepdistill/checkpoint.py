"""Checkpoints: safetensors and JSON, written aside and then renamed, so that a checkpoint is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.files import replacing


PREFIX = "step-"


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary sibling and renames it to `folder`; a failure leaves nothing behind.

    Raises:
        UserError: the disk is full or not writable; says that what was there before is intact.
    """
    try:
        with replacing(folder) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{folder} could not be written ({reason}); what was saved before is intact: "
            "make room and run the same command again to go on from it"
        ) from error


def save_tree(tree: Any, stem: Path) -> None:
    """Writes nested dicts, lists and tuples of tensors and plain values as `stem`.safetensors and `stem`.json."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            # clone: safetensors refuses tensors that share memory
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, pack(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [pack(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError(f"cannot store a {type(value).__name__} in a checkpoint")

    packed = pack(tree)
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(packed))


def load_tree(stem: Path) -> Any:
    """Reads what `save_tree` wrote; tensors come back on the CPU, bit by bit."""
    tensors = load_file(stem.with_suffix(".safetensors"))

    def unpack(node: Mapping[str, Any]) -> Any:
        ((kind, content),) = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: unpack(item) for key, item in content}
        if kind in ("list", "tuple"):
            items = [unpack(item) for item in content]
            return items if kind == "list" else tuple(items)
        return content

    return unpack(json.loads(stem.with_suffix(".json").read_text()))


class Checkpoints:
    """The folder `checkpoints/` of a run.

    Args:
        folder: where `step-*` folders live.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, rising."""
        found = self.folder.glob(f"{PREFIX}*")
        return sorted(int(p.name.removeprefix(PREFIX)) for p in found if p.name.removeprefix(PREFIX).isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"{PREFIX}{step:07d}"

    def save(self, step: int, roles: Mapping[str, Mapping[str, Tensor]], state: Any) -> Path:
        """Writes every role's weights as a file of its own, and the rest of the state beside them."""

        def write(target: Path) -> None:
            for role, tensors in roles.items():
                plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(plain, target / f"{role}.safetensors")
            save_tree(state, target / "state")

        write_atomically(self.path(step), write)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return self.path(step)

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], Any]:
        """=> (weights by role, the rest of the state)."""
        folder = self.path(step)
        try:
            roles = {p.stem: load_file(p) for p in folder.glob("*.safetensors") if p.stem != "state"}
            return roles, load_tree(folder / "state")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is damaged ({error}); delete it to go on from the checkpoint before") from error


def tensors_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
