"""Small helpers for files that several parts of the package write."""

from __future__ import annotations

import os
from pathlib import Path


def share(folder: Path) -> None:
    """Gives every file below `folder` the permissions that the user's umask grants to new files.

    safetensors writes through a private temporary file, and its renamed result would be readable by its owner alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
