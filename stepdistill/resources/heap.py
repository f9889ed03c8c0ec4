"""The C library's heap while a CPU trains: what one iteration frees stays for the next.

glibc gives the free end of its heap back to the system above some 64 MiB, and an iteration whose graphs are larger
gets it again page by page, which took 8 % of an iteration of `sid` on the bundled teacher. Accelerators have torch's
caching allocator for the same reason.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


# from malloc.h; see mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NEVER = -1
# The largest that glibc takes: tensors up to here come from the heap, larger ones from the system whatever is set.
LARGEST = 32 * 2**20
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Inside, freed memory stays with the process if it computes on the CPU; afterwards it is given back.

    Nothing happens where the C library is not glibc, or where the environment sets its allocator up.
    """
    library = _glibc() if device.type == "cpu" and not any(name in os.environ for name in CHOSEN) else None
    if library is None:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, LARGEST)
    library.mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        library.mallopt(TRIM_THRESHOLD, 2 * LARGEST)  # where glibc's own rule ends up with tensors of that size
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library if it is glibc, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    try:
        _ = library.mallopt, library.malloc_trim  # musl has neither
    except AttributeError:
        return None
    return library
