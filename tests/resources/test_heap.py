"""While a CPU trains, memory that an iteration frees is not given back and fetched again page by page."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from stepdistill.families import load_family
from stepdistill.objectives.vsd import VSD
from stepdistill.resources import heap
from stepdistill.resources.heap import kept_heap
from tests.tiny import trainer_of


ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PAGES = 16 * 16 * 2**20 // resource.getpagesize()  # of the work below
ON_GLIBC = pytest.mark.skipif(heap._glibc() is None, reason="another C library")


def work() -> None:
    """Sixteen tensors of 16 MiB at a time, as the graph of a network's pass holds them."""
    tensors = [torch.ones(4 * 2**20) for _ in range(16)]
    del tensors


def faults_of_work() -> int:
    """Pages that the second of two equal pieces of work got from the system."""
    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def report() -> None:
    """Prints pages in the order of the test below."""
    with kept_heap(CPU):
        inside, held = faults_of_work(), resident_pages()
    print(inside, held - resident_pages())


@ON_GLIBC
def test_what_was_freed_is_used_again_and_given_back_at_the_end() -> None:
    """In a process of its own: how much of a heap is free at its end depends on everything that came before."""
    environment = {key: value for key, value in os.environ.items() if key not in heap.CHOSEN}
    words = [sys.executable, "-c", "from tests.resources.test_heap import report; report()"]
    told = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    inside, given_back = map(int, told.stdout.split())
    assert inside < PAGES // 8, "but for what alignment leaves between tensors"
    assert given_back > PAGES // 2


class Library:
    """What is asked of the C library. Its own rule cannot be seen: it trims only where nothing small lies on top."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def mallopt(self, name: int, value: int) -> int:
        self.asked.append((name, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.asked.append((pad,))
        return 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_librarys_own_rule_returns_at_the_end(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    library = Library()
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), kept_heap(CPU):
        assert library.asked == [(heap.MMAP_THRESHOLD, heap.LARGEST), (heap.TRIM_THRESHOLD, heap.NEVER)]
        assert not fails or 1 / 0
    assert library.asked[2:] == [(heap.TRIM_THRESHOLD, 2 * heap.LARGEST), (0,)]


@ON_GLIBC
def test_where_the_environment_sets_the_allocator_up_it_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: pytest.fail("the library is not to be asked"))
    with kept_heap(torch.device("cuda", 0)):
        pass
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000000")
    with kept_heap(CPU):
        pass


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_other_c_libraries_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # like musl's, it has no mallopt
    with kept_heap(CPU):
        work()


def test_a_run_plays_its_iterations_in_it(sd_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    @contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        told.append(device)
        yield
        told.append(trainer.step)

    monkeypatch.setattr("stepdistill.trainer.kept_heap", recorded)
    trainer = trainer_of(load_family(sd_folder), VSD(), steps=2)
    trainer.run()
    assert told == [CPU, 2]
