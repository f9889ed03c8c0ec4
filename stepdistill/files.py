"""Files and folders that appear at once or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.errors import UserError, first_line


@contextmanager
def writing(path: Path, remedy: str = "make room and give the same command again") -> Iterator[None]:
    """Around what writes a file or a folder: a full disk or a missing permission is told with the place.

    Raises:
        UserError: it could not be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        raise UserError(f"{path} could not be written ({why(error)}); {remedy}") from error


def why(error: Exception) -> str:
    """What the system says, without the number and the file that Python adds."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives a new sibling of `folder` to write into and puts it in place when the block ends without an error.

    An error leaves nothing behind, and what stood at `folder` stays as it was. What a killed process left of an
    earlier attempt is cleared away.
    """
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        _share(new)
        _flush(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that appears at once or not at all; two processes may write the same one.

    Args:
        path: the file.
        write: is given another path in the same folder, and writes the file there.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _share(folder: Path) -> None:
    """Gives every file the permissions that the user's umask grants to new files.

    safetensors writes through a private temporary file, and its renamed result would be readable by its owner alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _flush(folder: Path) -> None:
    """Forces the files to disk before the rename, so that a power cut cannot leave a renamed but empty file."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
