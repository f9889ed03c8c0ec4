"""How a published LoRA is called, as keys of a model that is sampled or measured: by its name, or not at all."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.inspection.findings import only_tensors, spoken
from stepdistill.inspection.published import TRAILING, Recognised, recognise
from stepdistill.inspection.tensors import read_header


@dataclass(frozen=True)
class LoraCall:
    """How the makers of a LoRA call it.

    Attributes:
        options: fields of `stepdistill.bench.generate.ModelUnderTest`.
        fixed: it is for these steps and no others.
        because: what that rests on, for the user, who may know better.
    """

    options: dict[str, Any]
    fixed: bool
    because: str


def lora_call(path: str) -> LoraCall | None:
    """The call of a LoRA that is known by its name; None for others.

    Args:
        path: its file or folder, or a hub id.
    """
    found = recognise(_said_of(path))
    if found is None:
        return None
    model, extra = found.model, arguments(found.model.extra)
    options = {"steps": found.steps, "guidance_scale": model.guidance, **extra}
    word, because = _scheduler_word(found), f"by its name {path} is {model.name}"
    if word is not None:
        options["scheduler"] = word
    else:
        because += f", which wants {model.scheduler}({model.options}), and that cannot be given here"
    return LoraCall(options, found.fixed, f"{because}. {model.remark}".rstrip(". ") + ".")


def arguments(text: str) -> dict[str, Any]:
    """Keyword arguments as Python writes them => their values."""
    call = ast.parse(f"call({text})", mode="eval").body
    assert isinstance(call, ast.Call), "nothing else is written so"
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def _said_of(path: str) -> str:
    """All that may name its model: the file's name and what is in it, else the path as it is written."""
    place = Path(path)
    file = only_tensors(place) if place.is_dir() else place
    try:
        return spoken(read_header(file)) if file is not None and file.is_file() else path
    except UserError:
        return path  # what is wrong with the file, whoever loads it will say


def _scheduler_word(found: Recognised) -> str | None:
    """What `scheduler` of a model calls the class and its options; None if it has no word for them."""
    from stepdistill.bench import generate

    words = {kind: word for table in (generate.SCHEDULERS, generate.FLOW_SCHEDULERS) for word, kind in table.items()}
    word, options = words.get(found.model.scheduler), found.model.options
    if word is None or options not in ("", TRAILING):
        return None
    return word + generate.TRAILING if options else word
