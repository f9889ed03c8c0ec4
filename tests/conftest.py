"""Tiny teachers of the real classes, saved once per session and loaded afresh for whoever may change them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from stepdistill.families.base import ModelFamily


def pytest_configure() -> None:
    """One thread, here and in the processes that tests start.

    Tiny tensors gain nothing from more, and on a busy machine threads that wait for each other make a run ten times
    slower. torch reads the variable when it is imported, which has not happened yet.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A StableDiffusionPipeline with random weights; never written to."""
    from tests.families.test_export import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("teachers") / "sd")


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DiTPipeline with random weights; never written to."""
    from tests.families.test_export import tiny_dit

    return tiny_dit(tmp_path_factory.mktemp("teachers") / "dit")


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A StableDiffusion3Pipeline with random weights, a flow-matching teacher; never written to."""
    from tests.tiny import tiny_sd3

    return tiny_sd3(tmp_path_factory.mktemp("teachers") / "sd3")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A StableDiffusionXLPipeline with random weights; never written to."""
    from stepdistill.families.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("teachers") / "sdxl"
    tiny_pipeline("sdxl").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PixArtAlphaPipeline with random weights; never written to."""
    from stepdistill.families.tiny_pixart import tiny_pixart

    return _saved(tiny_pixart(), tmp_path_factory)


@pytest.fixture(scope="session")
def pixart_sigma_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PixArtSigmaPipeline with random weights; never written to."""
    from stepdistill.families.tiny_pixart import tiny_pixart_sigma

    return _saved(tiny_pixart_sigma(), tmp_path_factory)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A FluxPipeline with random weights that is told a guidance scale; never written to."""
    from stepdistill.families.tiny_flux import tiny_flux

    return _saved(tiny_flux(), tmp_path_factory)


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SanaPipeline with random weights; never written to."""
    from stepdistill.families.tiny_sana import tiny_sana

    return _saved(tiny_sana(), tmp_path_factory)


def _saved(pipeline: Any, factory: pytest.TempPathFactory) -> str:
    folder = factory.mktemp("teachers") / type(pipeline).__name__
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sd(sd_folder: str) -> ModelFamily:
    """The tiny Stable Diffusion, freshly loaded: a test may put adapters on it."""
    from stepdistill.families import load_family

    return load_family(sd_folder)


@pytest.fixture
def dit(dit_folder: str) -> ModelFamily:
    """The tiny DiT, freshly loaded."""
    from stepdistill.families import load_family

    return load_family(dit_folder)


@pytest.fixture
def sd3(sd3_folder: str) -> ModelFamily:
    """The tiny Stable Diffusion 3, freshly loaded."""
    from stepdistill.families import load_family

    return load_family(sd3_folder)
