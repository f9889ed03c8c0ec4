"""What the guided teacher was given and said on its way, stored and drawn; against the teacher and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.pair_maker import PairSettings, make_pairs, pair_noise
from stepdistill.data.pairs import PairSet, PairStream
from stepdistill.data.prompts import PromptSet
from stepdistill.data.sampler import StockSampler
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.prediction import Levels
from tests.oracles.exact import exact
from tests.oracles.oracle import batch_of, label
from tests.oracles.trajectories import STD, VP, slope


TEXTS = PromptSet(("3", "7"), "two digits")
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WAY = {"steps": 4, "guidance": (1.0, 6.0), "states": "all", "predictions": True, "batch_size": 2, "shard_size": 2}


def made(folder: Path, family: ModelFamily, **changes: Any) -> PairSet:
    return make_pairs(family, TEXTS, folder, PairSettings(**{"count": 3, **WAY, **changes}))


@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
def test_every_step_is_kept_with_what_the_guided_network_said(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family: ModelFamily = request.getfixturevalue(name)
    prompts = TEXTS if name == "dit" else PromptSet(("a", "b"))
    sampler = {"sampler": "euler"} if name == "sd3" else {}
    pairs = make_pairs(family, prompts, tmp_path / "way", PairSettings(count=3, **WAY, **sampler))
    assert len(pairs.state_timesteps) == 4 and pairs.state_timesteps[0] > 990 and pairs.num_states == 12
    found = pairs.states(range(12))
    assert found.guidance.min() >= 1 and found.guidance.max() <= 6 and len(found.guidance.unique()) == 3
    assert found.prompts == tuple(prompts.prompts[i] for i in (0, 1, 0) for _ in range(4))
    t = family.schedule.t_from_model_time(found.timesteps)
    null = family.null_condition(12)
    said = family.denoiser().guided(found.states, t, family.encode_prompts(found.prompts), null, found.guidance)
    torch.testing.assert_close(found.predictions, said.native, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.states[::4], pairs.batch(range(3)).noise, rtol=1e-5, atol=1e-5)
    other = pairs.states([7, 2])
    assert torch.equal(other.states, found.states[[7, 2]]) and torch.equal(other.guidance, found.guidance[[7, 2]])
    with pytest.raises(IndexError):
        pairs.states([12])


def test_a_scale_is_a_function_of_the_seed_and_the_pairs_number(sd: ModelFamily, tmp_path: Path) -> None:
    prompts = PromptSet(("a", "b"))
    one, other = (
        make_pairs(sd, prompts, tmp_path / name, PairSettings(**{"count": 3, **WAY, **changes}))
        for name, changes in (("one", {}), ("other", {"batch_size": 3, "shard_size": 3, "steps": 2}))
    )
    scales = one.states(range(0, 12, 4)).guidance
    assert torch.equal(scales, other.states(range(0, 6, 2)).guidance)
    assert one.summary().endswith("4 steps, guidance 1 to 6, seed 0")
    fixed = make_pairs(sd, prompts, tmp_path / "fixed", PairSettings(**{"count": 3, **WAY, "guidance": 2.5}))
    assert fixed.states([5]).guidance.tolist() == [2.5]


def test_at_scale_one_what_is_stored_is_what_the_prompt_alone_says(dit: ModelFamily, tmp_path: Path) -> None:
    for number, guidance in enumerate((1.0, (1.0, 1.0))):
        found = made(tmp_path / str(number), dit, guidance=guidance).states(range(12))
        t = dit.schedule.t_from_model_time(found.timesteps)
        said = dit.denoiser()(found.states, t, dit.encode_prompts(found.prompts)).native
        torch.testing.assert_close(found.predictions, said, rtol=1e-4, atol=1e-4)


def test_half_precision_rounds_the_way_and_where_it_leads(dit: ModelFamily, tmp_path: Path) -> None:
    full, half = (made(tmp_path / s, dit, storage=s) for s in ("fp32", "fp16"))
    assert torch.equal(full.batch(range(3)).latents.half().float(), half.batch(range(3)).latents)
    assert torch.equal(full.batch(range(3)).noise, half.batch(range(3)).noise)
    a, b = full.states(range(12)), half.states(range(12))
    assert b.states.dtype == torch.float32 and torch.equal(a.states.half().float(), b.states)
    assert torch.equal(a.predictions.half().float(), b.predictions) and not torch.equal(a.states, b.states)


def test_pairs_without_these_keep_their_fingerprint(dit: ModelFamily, tmp_path: Path) -> None:
    plain = make_pairs(dit, TEXTS, tmp_path / "plain", PairSettings(steps=2))
    assert not plain.facts.keys() & {"predictions", "storage"} and plain.facts["states"] == []
    with pytest.raises(UserError, match="do not hold what the teacher said on the way; make others with states=all"):
        plain.states([0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"predictions": True}, "predictions are kept where states are"), ({"guidance": (3.0, 2.0)}, "is no range")],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairSettings(**settings)


def test_an_epoch_comes_by_every_state_once(dit: ModelFamily, tmp_path: Path) -> None:
    pairs = made(tmp_path / "way", dit)
    stream = PairStream(pairs, EncodedOnTheFly(dit, pairs.prompts))
    batches = Batches(dit, TEXTS, EncodedOnTheFly(dit, TEXTS), None, 0, pairs=stream)
    stored, seen = pairs.states(range(12)), []
    for _ in range(4):
        batch = batches.next("states", 3)
        assert batch.visited is not None and batch.latents is None
        for row, x_t in enumerate(batch.visited.x_t):
            (number,) = [i for i in range(12) if torch.equal(stored.states[i], x_t)]
            assert torch.equal(batch.visited.native[row], stored.predictions[number])
            assert batch.visited.guidance[row] == stored.guidance[number]
            assert dit.schedule.model_time(batch.visited.t[row]) == stored.timesteps[number]
            assert batch.condition.tensors["class_labels"][row] == int(stored.prompts[number])
            seen.append(number)
    assert sorted(seen) == list(range(12)) and seen != sorted(seen)


def test_without_pairs_the_remedy_is_named(dit: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"set data\.pairs to their folder"):
        Batches(dit, TEXTS, EncodedOnTheFly(dit, TEXTS), None, 0).next("states", 2)


def test_the_noise_of_a_pair_is_that_of_pairs_without_states(dit: ModelFamily, tmp_path: Path) -> None:
    assert torch.equal(made(tmp_path / "way", dit).batch([1]).noise[0], pair_noise(0, 1, dit.latent_shape()))


def test_guided_paths_of_a_gaussian_have_the_mean_and_the_variance_of_the_closed_form() -> None:
    """Means 1 with the prompt and 0 without, so guidance w makes the Gaussian teacher of mean w.

    x_t - alpha_t w is multiplied by the slope of every DDIM step, from x_T with mean 0 and variance 1.
    """
    count, scale = 20_000, 3.0
    config = DDIMScheduler(**BETAS, set_alpha_to_one=True).config
    sampler = StockSampler(exact(VP, "epsilon", label, STD), config, steps=5, guidance=scale, keep="all")
    torch.manual_seed(0)
    noise = torch.randn(count, 1, dtype=torch.float64)
    batch = batch_of(noise, 1.0, 0.0)
    way = sampler(noise, batch.condition, batch.null)
    assert way.states is not None and way.predictions is not None and way.states.shape == (count, 5, 1)
    levels = [Levels.at(VP, VP.t_from_model_time(torch.tensor([t])), noise[:1]) for t in sampler.kept]
    clean = Levels.at(VP, torch.zeros(1), noise[:1])
    mean, deviation = 0.0, 1.0
    for place, (here, there) in enumerate(zip(levels, [*levels[1:], clean], strict=True)):
        found = way.states[:, place]
        assert abs(float(found.mean()) - mean) < 4 * deviation / count**0.5
        assert float(found.std()) == pytest.approx(deviation, rel=0.03)
        eps = here.sigma / (here.alpha**2 * STD**2 + here.sigma**2) * (found - here.alpha * scale)
        torch.testing.assert_close(way.predictions[:, place], eps, rtol=0, atol=1e-9)
        step = float(slope(here, there))
        mean = float(there.alpha) * scale + step * (mean - float(here.alpha) * scale)
        deviation *= step
    assert abs(float(way.sample.mean()) - mean) < 4 * deviation / count**0.5
    assert mean != pytest.approx(scale, abs=0.05), "a start without signal does not end at the guided mean"


def test_rows_of_one_batch_may_have_scales_of_their_own() -> None:
    noise = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = DDIMScheduler(**BETAS).config
    batch, denoiser = batch_of(noise, 1.0, 0.0), exact(VP, "epsilon", label, STD)
    mixed = StockSampler(denoiser, config, steps=3)(noise, batch.condition, batch.null, torch.tensor([1.0, 4.0]))
    for row, scale in enumerate((1.0, 4.0)):
        alone = StockSampler(denoiser, config, steps=3, guidance=scale)(noise, batch.condition, batch.null)
        torch.testing.assert_close(mixed.sample[row], alone.sample[row], rtol=0, atol=1e-12)
