"""Conditions: named tensors as one value."""

from __future__ import annotations

import pytest
import torch

from stepdistill.condition import Condition


def made(start: int, count: int = 3) -> Condition:
    rows = torch.arange(start, start + count)
    return Condition({"embeds": rows[:, None, None].expand(-1, 2, 4).float(), "labels": rows})


def test_rows_are_counted_and_tensors_must_agree_in_them() -> None:
    assert len(made(0)) == 3
    with pytest.raises(ValueError, match=r"agree in batch size.*'a': 2.*'b': 3"):
        Condition({"a": torch.zeros(2), "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("index", "rows"),
    [(slice(1, None), [1, 2]), (torch.tensor([2, 0, 2]), [2, 0, 2]), (torch.tensor([True, False, True]), [0, 2])],
)
def test_rows_are_picked_from_every_tensor(index: torch.Tensor | slice, rows: list[int]) -> None:
    picked = made(0)[index]
    assert picked.tensors["labels"].tolist() == rows
    assert picked.tensors["embeds"][:, 1, 3].tolist() == rows
    assert len(picked) == len(rows)


def test_cat_stacks_and_slicing_takes_apart_again() -> None:
    both = Condition.cat([made(0), made(10, 2)])
    assert both.tensors["labels"].tolist() == [0, 1, 2, 10, 11]
    assert both.tensors["embeds"].shape == (5, 2, 4)
    assert torch.equal(both[:3].tensors["embeds"], made(0).tensors["embeds"])
    assert torch.equal(both[3:].tensors["embeds"], made(10, 2).tensors["embeds"])


def test_where_takes_this_where_true_and_the_other_elsewhere() -> None:
    mixed = made(0).where(torch.tensor([True, False, True]), made(10))
    assert mixed.tensors["labels"].tolist() == [0, 11, 2]
    assert mixed.tensors["embeds"][:, 0, 0].tolist() == [0, 11, 2]
    assert mixed.tensors["labels"].dtype == torch.int64


def test_a_dtype_applies_to_floating_tensors_only_and_a_device_to_all() -> None:
    for moved in (made(0).to(torch.bfloat16), made(0).to(dtype=torch.bfloat16), made(0).to("cpu", torch.bfloat16)):
        assert moved.tensors["embeds"].dtype == torch.bfloat16
        assert moved.tensors["labels"].dtype == torch.int64
    for moved in (made(0).to("meta"), made(0).to(torch.device("meta")), made(0).to(device="meta", dtype=torch.half)):
        assert {t.device.type for t in moved.tensors.values()} == {"meta"}
        assert moved.tensors["labels"].dtype == torch.int64


def test_nothing_is_changed_in_place() -> None:
    one, other = made(0), made(10)
    one.where(torch.tensor([False] * 3), other).tensors["labels"].fill_(99)
    Condition.cat([one, other]).tensors["labels"].fill_(99)
    assert one.tensors["labels"].tolist() == [0, 1, 2]
    assert other.tensors["labels"].tolist() == [10, 11, 12]
