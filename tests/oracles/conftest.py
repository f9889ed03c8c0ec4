"""What several analytic tests are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracles.oracle import four_signs


@pytest.fixture
def exact_noise(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Four signs as every fresh noise, and those of z: means of quadratic functions over them are exact."""
    z, eps = four_signs()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps.to(x.dtype))
    return z
