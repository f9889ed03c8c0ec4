"""What the benchmark's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers.utils import logging

from stepdistill.bench import benchmark
from tests.benches import tiny_evaluator, tiny_teacher


@pytest.fixture
def quiet() -> None:
    """Diffusers says nothing of the pipelines it loads."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no file is not looked for on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and pages take longer than all else here, and have tests of their own."""
    for place, name in ((benchmark.plots, "pareto"), (benchmark.plots, "sample_grid"), (benchmark.page, "save_page")):
        monkeypatch.setattr(place, name, lambda *args: None)
    monkeypatch.setattr(benchmark, "LATENCY_CALLS", 1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny teacher; never written to."""
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny evaluator; never written to."""
    return tiny_evaluator(tmp_path_factory.mktemp("clip"))
