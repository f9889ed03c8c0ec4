"""Checkpoints: bit by bit, whole or absent, and nothing is lost when the disk is full."""

from __future__ import annotations

import errno
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.checkpoint import Checkpoints, load_tree, save_tree, tensors_equal, write_atomically
from stepdistill.errors import UserError


def roles(value: float = 1.0, size: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    return {"student": {"a.weight": torch.full((size,), value)}, "critic": {"b.weight": torch.full((2,), -value)}}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: the kernel refuses to let any file grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_tree_comes_back_bit_by_bit_with_its_types(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 0.1])
    shared = torch.arange(6.0)
    tree: dict[str, Any] = {
        "dtypes": [odd, odd.double(), odd.bfloat16(), odd.half(), torch.tensor([2**40]), torch.tensor([True, False])],
        "shapes": (torch.tensor(3.0), torch.zeros(0), torch.zeros(2, 0, 3), torch.arange(6.0).reshape(2, 3).T),
        "views of one memory": {"a": shared[:3], "b": shared[1:]},
        0: {1: "integer keys, as optimisers have them"},
        "values": [None, True, 1, 0.1, math.inf, "text \u00e9", []],
        "betas": (0.9, 0.999),
        "tensor": {"value": 1, "dict": 2, "list": 3},
        "empty": {},
    }
    save_tree(tree, tmp_path / "state")
    back = load_tree(tmp_path / "state")
    assert entries(tmp_path) == ["state.json", "state.safetensors"]
    assert list(back) == list(tree)
    for a, b in zip([*tree["dtypes"], *tree["shapes"]], [*back["dtypes"], *back["shapes"]], strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
        assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
    assert isinstance(back["shapes"], tuple)
    assert back["views of one memory"]["b"].tolist() == [1, 2, 3, 4, 5]
    for key in (0, "values", "betas", "tensor", "empty"):
        assert back[key] == tree[key]
    assert isinstance(back["betas"], tuple)


def test_a_tree_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot store a .*Path"):
        save_tree({"a": tmp_path}, tmp_path / "state")


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    folder = checkpoints.save(20, roles(), {"step": 20})
    assert entries(folder) == ["critic.safetensors", "state.json", "state.safetensors", "student.safetensors"]
    back, state = checkpoints.load(20)
    assert state == {"step": 20}
    assert back.keys() == roles().keys()
    assert all(tensors_equal(back[role], roles()[role]) for role in back)


def test_only_the_newest_are_kept_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 90, 100, 9_999_999, 10_000_000):
        checkpoints.save(step, roles(), {})
    assert checkpoints.steps() == [9_999_999, 10_000_000]


def test_what_is_no_whole_checkpoint_is_not_counted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, roles(), {})
    for name in (".step-0000004.partial", "step-last", "stage-0"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [3]
    assert Checkpoints(tmp_path / "nowhere").steps() == []


def test_a_failing_write_leaves_the_old_folder_and_no_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "step"
    write_atomically(target, lambda folder: (folder / "a").write_text("old"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_atomically(target, fail)
    assert entries(tmp_path) == ["step"]
    assert (target / "a").read_text() == "old"


def test_what_a_killed_process_left_behind_does_not_get_into_the_next_checkpoint(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-0000007.partial"
    leftover.mkdir()
    (leftover / "junk.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, roles(), {})
    assert entries(tmp_path) == ["step-0000007"]
    assert set(checkpoints.load(7)[0]) == {"student", "critic"}


def test_a_full_disk_is_a_users_error_that_says_what_is_intact(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "step-0000002"
    with pytest.raises(UserError, match=r"step-0000002 could not be written \(No space left on device\).*is intact"):
        write_atomically(target, full)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("size", [100, 2000])
def test_a_disk_that_fills_up_while_tensors_are_written_loses_nothing(tmp_path: Path, size: int) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, roles(1.0), {"step": 1})
    with files_of_at_most(size), pytest.raises(UserError, match=r"step-0000002 could not be written.*is intact"):
        checkpoints.save(2, roles(2.0, size=10_000), {"step": 2})
    assert entries(tmp_path) == ["step-0000001"]
    back, state = checkpoints.load(1)
    assert state == {"step": 1}
    assert all(tensors_equal(back[role], roles(1.0)[role]) for role in back)
    checkpoints.save(2, roles(2.0, size=10_000), {"step": 2})  # with room again
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("file", ["student.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(5, roles(), {"step": 5, "tensor": torch.zeros(3)}) / file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match=r"step-0000005 is damaged.*delete it to go on from the checkpoint before"):
        checkpoints.load(5)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_checkpoint_without_its_state_is_named(tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    (checkpoints.save(5, roles(), {"step": 5}) / file).unlink()
    with pytest.raises(UserError, match=r"step-0000005 is damaged"):
        checkpoints.load(5)


def test_written_files_have_the_permissions_that_the_umask_grants(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, {"student": {"a": torch.zeros(2)}}, {})
    reference = tmp_path / "reference"
    reference.write_text("")
    for file in folder.iterdir():
        assert file.stat().st_mode == reference.stat().st_mode, file.name


def test_a_folder_lost_between_two_renames_comes_back(tmp_path: Path) -> None:
    from stepdistill.files import replacing

    old = tmp_path / ".x.old"
    old.mkdir()
    (old / "kept").write_text("kept")
    with pytest.raises(RuntimeError), replacing(tmp_path / "x") as new:
        (new / "half").write_text("half")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["kept"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
