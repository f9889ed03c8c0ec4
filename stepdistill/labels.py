"""Classes of class-conditional pipelines, as a prompt names them."""

from __future__ import annotations

from typing import Any

from stepdistill.errors import UserError


def class_label(pipeline: Any, prompt: str) -> int:
    """The class that a text means to a `DiTPipeline`: its number, or one of the pipeline's own names.

    Raises:
        UserError: there is no such class.
    """
    classes = int(pipeline.transformer.config.num_embeds_ada_norm)
    names: dict[str, int] = pipeline.labels
    label = int(prompt) if prompt.strip().isdigit() else names.get(prompt)
    if label is None or not 0 <= label < classes:
        raise UserError(f"prompt {prompt!r} is no class of this DiT: give a number from 0 to {classes - 1}"
                        + (f" or one of its {len(names)} names" if names else ""))  # fmt: skip
    return label
