"""A batch divided among processes: who plays what, and that together they draw what one process would."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.processes.share import Share, SlicedDraws, divide
from tests.tiny import PROMPTS


ROWS, PARTS = 3, 2
EXAMPLE = torch.zeros(PARTS * ROWS, 2, 4)


def draws(rows: int) -> list[Callable[[], Tensor]]:
    """Random tensors for so many rows, in every way that torch has of asking for them."""
    example = EXAMPLE[:rows]
    chances = torch.full((rows, 9), 0.5)
    return [
        lambda: torch.randn(rows, 4, 8),
        lambda: torch.randn((rows, 2), dtype=torch.float64),
        lambda: torch.randn(size=(rows,)),
        lambda: torch.rand(torch.Size([rows, 1, 1])),
        lambda: torch.randint(7, (rows, 5)),
        lambda: torch.randint(2, 1000, (rows,)),
        lambda: torch.randint(low=3, high=90, size=(rows,)),
        lambda: torch.randn_like(example),
        lambda: torch.rand_like(example.transpose(1, 2)),
        lambda: torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), rows, replacement=True),
        lambda: torch.bernoulli(chances),
        lambda: torch.empty(rows, 3).normal_(),
        lambda: torch.empty(rows).uniform_(2, 3),
    ]


def played(part: int, ask: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(5)
    with SlicedDraws(ROWS, part, PARTS):
        torch.randn(())  # a scalar comes first, which is not divided
        return ask()


@pytest.mark.parametrize("way", range(len(draws(ROWS))))
def test_the_parts_of_a_draw_are_what_one_process_draws(way: int) -> None:
    torch.manual_seed(5)
    torch.randn(())
    alone = draws(PARTS * ROWS)[way]()
    together = torch.cat([played(part, draws(ROWS)[way]) for part in range(PARTS)])
    assert torch.equal(together, alone)
    assert not torch.equal(together[:ROWS], together[ROWS:]), "the parts are different numbers"


def test_both_halves_of_a_doubled_batch_are_cut_alike() -> None:
    torch.manual_seed(5)
    torch.randn(())
    first, second = torch.randn(2 * PARTS * ROWS, 4).chunk(2)
    for part in range(PARTS):
        mine = played(part, lambda: torch.randn(2 * ROWS, 4))
        own = slice(part * ROWS, (part + 1) * ROWS)
        assert torch.equal(mine, torch.cat([first[own], second[own]]))


def test_what_is_not_a_row_of_the_batch_is_the_same_for_all() -> None:
    asks: list[Callable[[], Tensor]] = [
        lambda: torch.randn(()),
        lambda: torch.rand(1, 5),
        lambda: torch.randn(ROWS, generator=torch.Generator().manual_seed(1)),
        lambda: nn.Linear(4, ROWS).weight.detach(),
    ]
    for ask in asks:
        assert torch.equal(played(0, ask), played(1, ask))
    assert not torch.equal(played(0, lambda: torch.randn(2, 5)), played(1, lambda: torch.randn(2, 5)))


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "expected"),
    [
        (32, 1, 1, Share(32, 1, 1)),
        (32, 1, 4, Share(8, 1, 1)),
        (1, 8, 8, Share(1, 1, 8)),
        (4, 6, 4, Share(2, 3, 2)),
        (2, 3, 3, Share(2, 1, 3)),
    ],
)
def test_micro_batches_are_divided_before_their_samples(
    batch: int, accumulate: int, processes: int, expected: Share
) -> None:
    found = divide(batch, accumulate, processes, "here")
    assert found == expected
    assert found.batch_size * found.accumulate * processes == batch * accumulate


def test_divided_networks_see_the_same_micro_batches() -> None:
    assert divide(4, 4, 4, "here", whole=True) == Share(1, 4, 1)
    with pytest.raises(UserError, match=r"here: batch_size 1 .* use 1 processes, or batch_size: 4 with accumulate: 2"):
        divide(1, 8, 4, "here", whole=True)


def test_a_batch_that_cannot_be_divided_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"stages\.0: batch_size 3 with accumulate 1 .* 2 processes; use 1 processes$"):
        divide(3, 1, 2, "stages.0")
    with pytest.raises(UserError, match="use 4 processes"):
        divide(4, 1, 5, "stages.0")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_processes_together_draw_the_samples_of_one_in_order(sd: ModelFamily, groups: int) -> None:
    prompts = PromptSet(PROMPTS)

    def batches(rank: int, processes: int) -> Batches:
        return Batches(sd, prompts, EncodedOnTheFly(sd, prompts), None, 0, rank, processes)

    alone, processes, micro = batches(0, 1), 4, 4
    wanted = [alone.next("prompts", micro).prompts for _ in range(8)]
    ranks = [batches(rank, processes) for rank in range(processes)]
    found = []
    for _ in range(8 // groups):
        turns = [one.next("prompts", micro * groups // processes, groups).prompts for one in ranks]
        parts = processes // groups
        found += [sum(turns[parts * g : parts * (g + 1)], ()) for g in range(groups)]
    assert found == wanted
    assert ranks[3].drawn == alone.drawn, "a checkpoint says the same whoever writes it"
