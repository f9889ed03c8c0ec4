"""Stored pairs: what a sampler makes of noise, files that survive a kill, and batches drawn from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stepdistill.data import pair_maker
from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.pair_maker import PairSettings, make_pairs
from stepdistill.data.pairs import PairSet, PairStream, load_pairs, pair_noise, shard_path
from stepdistill.data.prompts import PromptSet
from stepdistill.data.sampler import StockSampler
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from tests.tiny import PROMPTS


ROOT = Path(__file__).resolve().parents[2]
TEXTS = PromptSet(PROMPTS[:5], "five letters")
FEW = PairSettings(count=7, steps=2, guidance=2.0, batch_size=2, shard_size=3)


@pytest.fixture(scope="module")
def family(sd_folder: str) -> ModelFamily:
    return load_family(sd_folder)


def made(folder: Path, family: ModelFamily, prompts: PromptSet = TEXTS, **changes: Any) -> PairSet:
    return make_pairs(family, prompts, folder, PairSettings(**{**vars(FEW), **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- what is stored ------------------------------------------------------------------------------------------------


def test_the_noise_of_a_pair_depends_on_the_seed_and_its_number_alone(family: ModelFamily, tmp_path: Path) -> None:
    one = made(tmp_path / "one", family)
    other = made(tmp_path / "other", family, count=5, batch_size=5, shard_size=2, sampler="dpm++", guidance=1.0)
    assert torch.equal(one.batch([4, 0, 3]).noise, other.batch([4, 0, 3]).noise)
    assert torch.equal(one.batch([6]).noise[0], pair_noise(0, 6, family.latent_shape()))
    elsewhere = made(tmp_path / "elsewhere", family, count=5, seed=1)
    all_noise = torch.cat([one.batch(range(7)).noise, elsewhere.batch(range(5)).noise]).flatten(1)
    assert len(all_noise.unique(dim=0)) == 12


@pytest.mark.parametrize(("storage", "error", "factor"), [("fp16", 2**-11, 2), ("fp8", 2**-4, 4)])
def test_narrow_files_keep_the_noise_exactly_and_round_the_samples(
    family: ModelFamily, tmp_path: Path, storage: str, error: float, factor: int
) -> None:
    wide, narrow = made(tmp_path / "wide", family), made(tmp_path / "narrow", family, storage=storage)
    expected, found = wide.batch(range(7)), narrow.batch(range(7))
    assert torch.equal(found.noise, expected.noise) and found.prompts == expected.prompts
    assert found.latents.dtype == torch.float32 and not torch.equal(found.latents, expected.latents)
    # Half a unit in the last place of numbers near one; below the smallest normal number, of that number.
    assert ((found.latents - expected.latents).abs() <= error * expected.latents.abs().clamp(min=2**-6)).all()
    with (
        safe_open(shard_path(tmp_path / "narrow", 0), "pt") as small,
        safe_open(shard_path(tmp_path / "wide", 0), "pt") as big,
    ):
        assert "noise" not in small.keys() and "noise" in big.keys()  # noqa: SIM118
        assert big.get_tensor("sample").nbytes == factor * small.get_tensor("sample").nbytes


def test_files_stored_otherwise_are_other_pairs(family: ModelFamily, tmp_path: Path) -> None:
    made(tmp_path / "pairs", family, storage="fp16")
    with pytest.raises(UserError, match="storage"):
        made(tmp_path / "pairs", family)


def test_a_pair_is_the_samplers_answer_to_its_noise_and_prompt(family: ModelFamily, tmp_path: Path) -> None:
    pairs = made(tmp_path / "pairs", family, states=(499,))
    found = pairs.batch([6, 1])
    assert found.prompts == ("b", "b"), "more pairs than prompts: pair 6 is of prompt 6 modulo 5"
    assert not torch.equal(found.noise[0], found.noise[1])
    sampler = StockSampler(family.denoiser(), family.pipeline.scheduler.config, steps=2, guidance=2.0, keep=(499,))
    end = sampler(found.noise, family.encode_prompts(found.prompts), family.null_condition(2))
    torch.testing.assert_close(found.latents, end.sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.states, end.states, rtol=1e-4, atol=1e-4)
    assert pairs.state_timesteps == (499,)
    assert len(pairs) == 7 and pairs.prompts.prompts == TEXTS.prompts
    assert pairs.summary().endswith("DDIMScheduler, 2 steps, guidance 2, seed 0")


def test_a_shard_explains_itself(family: ModelFamily, tmp_path: Path) -> None:
    pairs = made(tmp_path / "pairs", family, states=(499,))
    with safe_open(shard_path(pairs.folder, 1), framework="pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        assert file.get_tensor("prompt_index").tolist() == [3, 4, 0]
        assert '["d", "e", "a"]' in file.metadata()["pairs"]
        assert file.get_tensor("state_timesteps").tolist() == [499]
        assert file.get_tensor("noise").dtype == file.get_tensor("sample").dtype == torch.float32
    c, h, w = family.latent_shape()
    assert shapes["noise"] == shapes["sample"] == (3, c, h, w)
    assert shapes["states"] == (3, 1, c, h, w)


def test_class_labels_are_prompts_too(dit: ModelFamily, tmp_path: Path) -> None:
    pairs = make_pairs(dit, PromptSet(("3", "7")), tmp_path / "pairs", PairSettings(steps=2, guidance=2.0))
    found = pairs.batch([0, 1])
    sampler = StockSampler(dit.denoiser(), dit.pipeline.scheduler.config, steps=2, guidance=2.0)
    assert sampler.facts["clip_sample"] is False, "latents are not pixels in [-1, 1]"
    end = sampler(found.noise, dit.encode_prompts(["3", "7"]), dit.null_condition(2)).sample
    torch.testing.assert_close(found.latents, end)


def test_half_precision_changes_the_sample_a_little_and_the_noise_not_at_all(
    family: ModelFamily, tmp_path: Path
) -> None:
    full, half = (made(tmp_path / p, family, count=2, precision=p).batch([0, 1]) for p in ("fp32", "bf16"))
    assert torch.equal(full.noise, half.noise)
    assert half.latents.dtype == torch.float32
    relative = (full.latents - half.latents).norm() / full.latents.norm()
    assert 0 < relative < 0.1


def test_a_state_that_the_sampler_does_not_visit_is_refused_with_its_neighbours(
    family: ModelFamily, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="does not visit timestep 700; the nearest of its 4 steps are 749 and 499"):
        made(tmp_path / "pairs", family, steps=4, states=(999, 700))
    assert not (tmp_path / "pairs").exists()


# ---- interruptions -------------------------------------------------------------------------------------------------


def test_making_pairs_goes_on_after_a_kill_and_ends_with_the_same_bits(
    sd_folder: str, family: ModelFamily, tmp_path: Path
) -> None:
    settings = PairSettings(count=16, steps=4, batch_size=2, shard_size=2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["data", "pairs", sd_folder, "count=16", "steps=4", "batch_size=2", "shard_size=2", "--device", "cpu",
             "--prompts", str(prompts), "--output", str(tmp_path / "killed"), "--quiet"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "stepdistill", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not shard_path(tmp_path / "killed", 1).exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    left = len(list((tmp_path / "killed").glob("shard-*.safetensors")))
    assert 2 <= left < 8, "killed in the middle"
    with pytest.raises(UserError, match=f"of 16 pairs only {2 * left} are there and whole"):
        load_pairs(tmp_path / "killed")

    texts = PromptSet(PROMPTS, str(prompts))
    make_pairs(family, texts, tmp_path / "killed", settings)
    make_pairs(family, texts, tmp_path / "undisturbed", settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_finished_shards_are_not_made_again_and_a_damaged_one_is(
    family: ModelFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pairs"
    made(folder, family)
    before, made_again = contents(folder), []
    original = StockSampler.__call__

    def counting(self: StockSampler, noise: Tensor, *args: Any) -> Any:
        made_again.append(len(noise))
        return original(self, noise, *args)

    monkeypatch.setattr(StockSampler, "__call__", counting)
    made(folder, family)
    assert made_again == []
    damaged = shard_path(folder, 1)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(UserError, match="of 7 pairs only 3 are there and whole"):
        load_pairs(folder)
    made(folder, family)
    assert made_again == [2, 1]
    assert contents(folder) == before


def test_more_pairs_of_the_same_kind_leave_the_whole_shards_alone(family: ModelFamily, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    made(folder, family)
    before = contents(folder)
    assert len(made(folder, family, count=11)) == 11
    after = contents(folder)
    assert all(after[shard_path(folder, i).name] == before[shard_path(folder, i).name] for i in (0, 1))
    straight = made(tmp_path / "straight", family, count=11)
    assert contents(folder) == contents(straight.folder)
    assert len(made(folder, family, count=4)) == 4, "fewer are there already"


def test_progress_counts_all_pairs(family: ModelFamily, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_pairs(family, TEXTS, tmp_path / "pairs", FEW, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [2, 3, 3, 5, 6, 6, 7, 7]
    assert {total for _, total in seen} == {7}


def test_a_full_disk_is_a_user_error_and_leaves_no_half_file(
    family: ModelFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:  # index, first shard, second shard
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pair_maker.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        made(tmp_path / "pairs", family)
    assert sorted(contents(tmp_path / "pairs")) == ["index.json", "shard-00000.safetensors"]


# ---- fingerprints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance": 4.0}, "guidance: 2.0 there, 4.0 here"),
        ({"steps": 4}, "steps: 2 there, 4 here"),
        ({"seed": 9}, "seed: 0 there, 9 here"),
        ({"sampler": "dpm++"}, "sampler.class: DDIMScheduler there, DPMSolverMultistepScheduler here"),
        ({"states": (499,)}, r"states: \[\] there, \[499\] here"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 here"),
        ({"prompts": PromptSet(("x",))}, "prompts: "),
    ],
)
def test_pairs_that_were_made_otherwise_are_refused_and_the_difference_named(
    family: ModelFamily, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "pairs"
    made(folder, family, count=1)
    before = contents(folder)
    with pytest.raises(UserError, match=said) as caught:
        made(folder, family, **{"count": 1, **changes})
    assert "teacher" not in str(caught.value), "only what differs is named"
    assert contents(folder) == before


def test_fresh_replaces_pairs_and_nothing_else(family: ModelFamily, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    made(folder, family)
    (folder / "notes.txt").write_text("mine")
    settings = PairSettings(**{**vars(FEW), "count": 2, "guidance": 5.0})
    pairs = make_pairs(family, TEXTS, folder, settings, fresh=True)
    assert pairs.facts["guidance"] == 5.0
    assert sorted(contents(folder)) == ["index.json", "notes.txt", "shard-00000.safetensors"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(family: ModelFamily, tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "shard-00000.safetensors").write_text("somebody's")
    with pytest.raises(UserError, match="is not empty and holds no pairs"):
        make_pairs(family, TEXTS, tmp_path, FEW, fresh=fresh)
    assert list(contents(tmp_path)) == ["shard-00000.safetensors"]


def test_pairs_of_another_teacher_are_refused_for_training(
    sd: ModelFamily, family: ModelFamily, tmp_path: Path
) -> None:
    made(tmp_path / "pairs", family)
    assert len(load_pairs(tmp_path / "pairs", sd)) == 7, "the same weights from elsewhere are the same teacher"
    with torch.no_grad():
        next(sd.network().parameters()).add_(1e-3)
    with pytest.raises(UserError, match=r"do not fit this run \(teacher: [0-9a-f]{8} there, [0-9a-f]{8} here\)"):
        load_pairs(tmp_path / "pairs", sd)
    with pytest.raises(UserError, match=r"latent shape: \[4, 8, 8\] there, \[4, 16, 16\] here"):
        load_pairs(tmp_path / "pairs", family, size=32)


def test_a_changed_index_and_a_folder_without_one_are_told_apart(family: ModelFamily, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no pairs, it has no index\.json; make them with"):
        load_pairs(tmp_path)
    index = made(tmp_path / "pairs", family).folder / "index.json"
    text = index.read_text()
    index.write_text(text.replace('"guidance": 2.0', '"guidance": 3.0'))
    with pytest.raises(UserError, match="was changed"):
        load_pairs(index.parent)
    index.write_text(text[:40])
    with pytest.raises(UserError, match="cannot be read"):
        load_pairs(index.parent)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"steps": 0}, "steps must be at least 1"), ({"states": (499, 999)}, "states must be falling timesteps")],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PairSettings(**settings)


# ---- the stream ----------------------------------------------------------------------------------------------------


def batches_of(family: ModelFamily, pairs: PairSet | None, **more: Any) -> Batches:
    stream = None if pairs is None else PairStream(pairs, EncodedOnTheFly(family, pairs.prompts))
    return Batches(family, TEXTS, EncodedOnTheFly(family, TEXTS), None, 0, pairs=stream, **more)


def test_the_stream_keeps_noise_sample_and_prompt_together_and_plays_every_pair_once(
    family: ModelFamily, tmp_path: Path
) -> None:
    pairs = made(tmp_path / "pairs", family)
    stored, batches, seen = pairs.batch(range(7)), batches_of(family, pairs), []
    for _ in range(7):
        batch = batches.next("pairs", 1)
        assert batch.pair_noise is not None and batch.latents is not None
        (number,) = [i for i in range(7) if torch.equal(stored.noise[i], batch.pair_noise[0])]
        assert torch.equal(batch.latents[0], stored.latents[number])
        assert batch.prompts == (stored.prompts[number],)
        wanted = family.encode_prompts(batch.prompts).tensors["prompt_embeds"]
        torch.testing.assert_close(batch.condition.tensors["prompt_embeds"], wanted)
        seen.append(number)
    assert sorted(seen) == list(range(7))
    assert seen != list(range(7)), "each epoch has an order of its own"


def test_a_resumed_stream_goes_on_with_the_right_pairs_and_ranks_share_none(
    family: ModelFamily, tmp_path: Path
) -> None:
    pairs = made(tmp_path / "pairs", family)
    straight, resumed = batches_of(family, pairs), batches_of(family, pairs)
    straight.next("pairs", 2)
    resumed.restore(dict(straight.drawn))
    second = straight.next("pairs", 2).pair_noise
    assert second is not None and torch.equal(second, resumed.next("pairs", 2).pair_noise)  # type: ignore[arg-type]
    ranks = [batches_of(family, pairs, rank=rank, num_processes=2).next("pairs", 3).pair_noise for rank in (0, 1)]
    assert len(torch.cat([r for r in ranks if r is not None]).flatten(1).unique(dim=0)) == 6


def test_an_objective_that_needs_pairs_says_so_where_there_are_none(family: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"set data\.pairs to their folder; make them with: stepdistill data pairs"):
        batches_of(family, None).next("pairs", 2)


def test_a_number_outside_the_pairs_is_refused(family: ModelFamily, tmp_path: Path) -> None:
    pairs = made(tmp_path / "pairs", family)
    for number in (7, -1):
        with pytest.raises(IndexError):
            pairs.batch([number])
