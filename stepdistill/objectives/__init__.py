"""The published methods, found by name, by Python path, or through the entry points of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from stepdistill.errors import UserError


# name in recipes => where it lives; an explicit table, so that nothing registers itself at import
OBJECTIVES: dict[str, str] = {
    "denoising": "stepdistill.objectives.denoising:Denoising",
    "vsd": "stepdistill.objectives.vsd:VSD",
    "regression": "stepdistill.objectives.regression:Regression",
    "dmd": "stepdistill.objectives.dmd:DMD",
    "dmd2": "stepdistill.objectives.dmd2:DMD2",
    "sid": "stepdistill.objectives.sid:SiD",
    "f_distill": "stepdistill.objectives.f_distill:FDistill",
    "esd": "stepdistill.objectives.esd:ESD",
    "disback": "stepdistill.objectives.disback:DisBack",
    "clip": "stepdistill.objectives.clip:Clip",
    "consistency": "stepdistill.objectives.consistency:Consistency",
    "lcm": "stepdistill.objectives.lcm:LCM",
    "pcm": "stepdistill.objectives.pcm:PCM",
    "tcd": "stepdistill.objectives.tcd:TCD",
    "tscd": "stepdistill.objectives.tscd:TSCD",
    "reward": "stepdistill.objectives.reward:RewardFeedback",
    "scm": "stepdistill.objectives.scm:SCM",
    "sprint": "stepdistill.objectives.sprint:Sprint",
    "progressive": "stepdistill.objectives.progressive:Progressive",
    "lightning": "stepdistill.objectives.lightning:Lightning",
    "ladd": "stepdistill.objectives.ladd:LADD",
    "add": "stepdistill.objectives.add:ADD",
    "compress": "stepdistill.objectives.compress:Compress",
    "agd": "stepdistill.objectives.agd:AGD",
    "guidance": "stepdistill.objectives.guidance:GuidanceDistillation",
    "sum": "stepdistill.objectives.weighted_sum:WeightedSum",
}
ENTRY_POINT_GROUP = "stepdistill.objectives"


def known_objectives() -> dict[str, str]:
    """All names that a recipe may use, with the place of each: ours and those of installed packages."""
    installed = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return {**installed, **OBJECTIVES}


def name_of(kind: type) -> str:
    """The name by which `resolve` finds a class: a short one if it has one, else "package.module:Class"."""
    place = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, known in known_objectives().items() if known == place), place)


def resolve(name: str) -> type:
    """An objective's class by its name in a recipe, or by "package.module:Class".

    Raises:
        UserError: nothing of that name; names the nearest one.
    """
    found: type = find(name, known_objectives(), "objective")
    return found


def find(name: str, table: Mapping[str, str], what: str) -> Any:
    """What lies at the place that a table has for a name, or at a name that is itself "package.module:attribute".

    Raises:
        UserError: nothing of that name; names the nearest one.
    """
    module, colon, attribute = table.get(name, name).partition(":")
    if not colon:
        near = get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(table))}"
        raise UserError(f"unknown {what} {name!r}; {hint} (or give 'package.module:Class')")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what} {name!r} could not be imported: {error}") from error
