"""The overhead benchmark runs, and the passes that it times are those that an iteration makes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from stepdistill.cast import Cast


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", overhead.OBJECTIVES)
def test_the_bare_passes_are_those_that_an_iteration_makes(sd_folder: str, name: str, lora: bool) -> None:
    args = argparse.Namespace(teacher=sd_folder, device="cpu", batch_size=2, lora=lora, rank=2)
    objective, passes = overhead.passes_of(name, 2)
    trainer = overhead.trainer_of(objective, args)
    roles = {"teacher", *(p.role for p in passes)}
    counts = [calls_of(trainer.cast, roles, work) for work in (trainer._iterate, overhead.bare(trainer, passes))]
    assert counts[0] == counts[1]
    assert sum(counts[0]["begun"]) == 2 * sum(p.rows for p in passes)
    assert (counts[0]["ended"] == counts[0]["begun"]) == (name != "dmd2_gan"), "features need no whole pass"


def calls_of(cast: Cast, roles: set[str], work: Callable[[], None]) -> dict[str, list[int]]:
    """Rows of all calls of all networks, sorted: those that began, and those that came to the end."""
    seen: dict[str, list[int]] = {"begun": [], "ended": []}
    networks = {id(n): n for n in (cast.denoiser(role).weights.network for role in roles)}
    handles = []
    for network in networks.values():
        for layer, key in (("conv_in", "begun"), ("conv_out", "ended")):
            hook = lambda m, args, key=key: seen[key].append(len(args[0]))  # noqa: E731
            handles.append(network.get_submodule(layer).register_forward_pre_hook(hook))
    work()
    for handle in handles:
        handle.remove()
    return {key: sorted(rows) for key, rows in seen.items()}


def test_one_run_measures_every_objective_and_keeps_other_rows(sd_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "overhead.json"
    words = ["--teacher", sd_folder, "--batch-size", "2", "--critic-updates", "1", "--rounds", "1", "--warmup", "1",
             "--rank", "2", "--output", str(output)]  # fmt: skip
    output.write_text(
        json.dumps({"rows": [{"model": "sid, full", "ratio": 7}, {"model": "dmd2_gan, LoRA", "ratio": 1}]})
    )
    overhead.main([*words, "--objectives", "vsd", "dmd2_gan", "--lora"])
    other, *rows = json.loads(output.read_text())["rows"]
    assert other == {"model": "sid, full", "ratio": 7}
    assert [row["model"] for row in rows] == ["vsd, LoRA", "dmd2_gan, LoRA"]
    for row in rows:
        assert row["ratio"] > 0
        assert row["process_ratio"] > 0
        assert row["seconds_per_iteration"] > 0
        assert row["peak_gib"] is None or 0.05 < row["peak_gib"] < 64


def test_the_peak_of_memory_is_that_of_the_work_alone() -> None:
    before = overhead.peak_gib(lambda: None, torch.device("cpu"))
    if before is None:
        pytest.skip("no /proc here")
    peak = overhead.peak_gib(lambda: torch.ones(2**27).sum().item(), torch.device("cpu"))
    after = overhead.peak_gib(lambda: None, torch.device("cpu"))
    assert peak is not None
    assert after is not None
    assert peak - before == pytest.approx(0.5, abs=0.1)
    assert after < peak - 0.4
