"""Where the bundled teacher and evaluator lie: in a checkout, or inside an installed wheel."""

from __future__ import annotations

import re
from pathlib import Path

from stepdistill.errors import UserError


_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE.parent / "assets", _PACKAGE / "_assets")  # in a checkout, in a wheel
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def assets_path(*parts: str) -> Path:
    """The path of a bundled file or folder: `assets_path("shapes", "teacher")`.

    A checkout keeps them in `assets` beside the package; the wheel carries the same folder as `stepdistill/_assets`.

    Raises:
        UserError: if neither place has it; the text names both.
    """
    candidates = [place.joinpath(*parts) for place in _PLACES]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise UserError(
        f"bundled asset {'/'.join(('assets', *parts))} found neither at {candidates[0]} nor at {candidates[1]}; "
        "reinstall stepdistill, or run from a complete checkout"
    )


def resolve_model_path(text: str) -> str:
    """Finds a model that a recipe or a command names: a path is taken as it is, "assets/..." also if bundled.

    Args:
        text: an existing path, "assets/...", or a hub id; the last is returned unchanged.

    Raises:
        UserError: if there is no such path or asset, and the text cannot be a hub id either.
    """
    text = resolve_bundled(text)
    if Path(text).exists():
        return text
    if not _HUB_ID.fullmatch(text):
        raise UserError(f"model {text!r}: no such file or folder; give a Diffusers folder, or a hub id as owner/name")
    return text


def resolve_bundled(text: str) -> str:
    """Finds "assets/..." also if it is bundled; any other path is returned unchanged, whether there is one or not.

    Raises:
        UserError: if it names an asset that is not there.
    """
    first, *rest = Path(text).parts or ("",)
    return str(assets_path(*rest)) if first == "assets" and not Path(text).exists() else text
