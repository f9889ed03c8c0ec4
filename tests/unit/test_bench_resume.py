"""A benchmark that was killed goes on where it was, reads no more than it needs, and knows its models again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepdistill.bench import benchmark, cells
from stepdistill.bench.benchmark import Options, Progress, run_benchmark
from stepdistill.bench.cells import Cell, Share
from stepdistill.bench.generate import Cost, ModelUnderTest, Painter
from stepdistill.bench.models import identity
from stepdistill.bench.prompts import ShapesProtocol
from stepdistill.bench.report import Report, load_report
from tests.unit.test_bench_cells import counted


pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


@pytest.fixture(scope="module")
def model(teacher: Path) -> ModelUnderTest:
    return ModelUnderTest("teacher", str(teacher), steps=2, guidance_scale=3.0, scheduler="lcm")


@pytest.fixture(scope="module")
def protocol(evaluator: Path) -> ShapesProtocol:
    return ShapesProtocol(prompts=4, images_per_prompt=3, reference=20, evaluator=str(evaluator))


def measured(model: ModelUnderTest, protocol: ShapesProtocol, output: Path, **options: object) -> Report:
    return run_benchmark([model, replace(model, name="other", steps=1)], protocol=protocol, output=output,
                         batch_size=3, **options)  # fmt: skip


def killed(work: Callable[[], object]) -> None:
    """Does work in another process, which must not survive it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("moment", "left"), [("between parts", 6), ("within a part", 6), ("before the disk had it", 9)]
)
def test_a_killed_benchmark_goes_on_and_ends_with_the_same_report(
    model: ModelUnderTest, protocol: ShapesProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str,
    left: int,
) -> None:  # fmt: skip
    straight = measured(model, protocol, tmp_path / "straight")

    def between() -> None:
        def stop(news: Progress) -> None:
            if news.label == "teacher" and news.done == 6:
                die()

        measured(model, protocol, tmp_path / "killed", on_progress=stop)

    def within() -> None:
        save, written = cells.save_file, []

        def write(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
            save(tensors, file, metadata=metadata)
            written.append(file)
            if len(written) == 3:
                file.write_bytes(file.read_bytes()[:100])
                die()

        cells.save_file = write
        measured(model, protocol, tmp_path / "killed")

    killed(within if moment == "within a part" else between)
    assert not (tmp_path / "killed/report.json").exists()
    if moment == "before the disk had it":
        newest = sorted((tmp_path / "killed/cells").rglob("part-*"))[-1]
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    made: list[tuple[int, int]] = []
    paint = benchmark.paint

    def watch(painter: Painter, jobs: list[tuple[int, int]], *args: object, **options: object) -> object:
        made.extend(jobs if painter.model.name == "teacher" else [])
        return paint(painter, jobs, *args, **options)

    monkeypatch.setattr(benchmark, "paint", watch)
    resumed = measured(model, protocol, tmp_path / "killed")
    assert len(made) == left, "what was whole must not be made again"
    assert counted(resumed) == counted(straight)
    assert counted(load_report(tmp_path / "killed")) == counted(straight)


def test_a_part_is_read_tensor_by_tensor_when_something_of_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, wanted, read = Cell(tmp_path, "a model", {}), [], cells._tensor
    for first in (2, 0):
        rows = torch.tensor([[first], [first + 1.0]])
        cell.save([first, first + 1], {"a": rows, "b": -rows}, {first: torch.zeros(3, 1, 1)}, Cost(made=2), None)
    monkeypatch.setattr(cells, "_tensor", lambda part, name: (wanted.append(name), read(part, name))[1])
    assert cell.missing(4) == []
    stored = cell.load(4)
    assert set(wanted) == {"jobs"}
    assert list(stored.values) == ["a", "b"]
    assert stored.values["b"].flatten().tolist() == [0, -1, -2, -3]
    assert wanted.count("value.b") == 2 and "value.a" not in wanted
    with pytest.raises(KeyError):
        stored.values["c"]


def test_processes_but_the_first_do_not_read_what_all_have_made(
    model: ModelUnderTest, protocol: ShapesProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cell, "load", lambda *args: pytest.fail("only the first writes a report"))
    found = measured(model, protocol, tmp_path, options=Options(share=Share(1, 2)))
    assert found.rows == ()
    assert len(list(tmp_path.rglob("part-*"))) == 4, "its half of two models' batches"


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the network was asked")


def test_a_model_of_the_hub_is_known_by_the_commit_that_would_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = {"some/base": "a" * 40, "some/lora": "b" * 40}
    cached: set[str] = set()

    def snapshot(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only and repository not in cached:
            raise FileNotFoundError(repository)
        cached.add(repository)
        return str(tmp_path / "snapshots" / newest[repository])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = ModelUnderTest("x", "some/base", 4, 1.0, lora="some/lora", scheduler="lcm")
    assert identity(model, offline=True)["path_sha256"] == "some/base", "there is nothing to know it by"
    before = identity(model)
    assert (before["path_sha256"], before["lora_sha256"], before["scheduler_sha256"]) == ("a" * 40, "b" * 40, "lcm")
    assert identity(model, offline=True) == before
    newest["some/lora"] = "c" * 40
    assert identity(model)["lora_sha256"] == "c" * 40


def test_offline_the_cache_says_the_commit_also_of_a_repository_without_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place, commit = tmp_path / "models--some--lora", "d" * 40
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "snapshots" / commit / "pytorch_lora_weights.safetensors").touch()
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    model = ModelUnderTest("x", "some/base", 4, 1.0, lora="some/lora")
    found = identity(model, offline=True)
    assert (found["lora_sha256"], found["path_sha256"]) == (commit, "some/base")
