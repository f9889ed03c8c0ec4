from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from stepdistill.condition import Condition
from stepdistill.data.cache import ConditionCache, EncodedOnTheFly, conditions_fingerprint
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError


class Tokenizer:
    model_max_length = 6

    def __init__(self) -> None:
        self.vocabulary = {chr(ord("a") + i): i for i in range(26)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


class Family:
    """Encodes a prompt as its letters' embeddings; counts what it is asked for."""

    name = "fake"
    encoding_facts: ClassVar[dict[str, str]] = {}

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Embedding(26, 4, dtype=dtype)
        self.pipeline = SimpleNamespace(components={"tokenizer": Tokenizer(), "unet": None})
        self.encoded: list[str] = []
        self.fail_after: int | None = None

    def text_modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder}

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        if self.fail_after is not None and len(self.encoded) >= self.fail_after:
            raise KeyboardInterrupt
        self.encoded += prompts
        ids = torch.tensor([[ord(c) - ord("a") for c in p] for p in prompts])
        return Condition({"embeds": self.encoder(ids), "ids": ids})


PROMPTS = PromptSet(tuple(chr(ord("a") + i) + chr(ord("z") - i) for i in range(11)))


def cache_of(folder: Path, family: Family, prompts: PromptSet = PROMPTS, batch_size: int = 3) -> ConditionCache:
    return ConditionCache(folder, family, prompts, batch_size, shard_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_gives_exactly_what_the_encoder_gives_in_its_dtype(tmp_path, dtype):
    family = Family(dtype)
    cache = cache_of(tmp_path, family)
    cache.build()
    indices = [10, 0, 3, 4, 4, 7]
    cached, direct = cache.conditions(indices), EncodedOnTheFly(family, PROMPTS).conditions(indices)
    assert cached.tensors["embeds"].dtype == dtype
    assert not cached.tensors["embeds"].requires_grad
    assert cached.tensors.keys() == direct.tensors.keys()
    assert all(torch.equal(cached.tensors[k], direct.tensors[k]) for k in cached.tensors)


def test_a_second_build_encodes_nothing(tmp_path):
    cache_of(tmp_path, Family()).build()
    again = Family()
    cache = cache_of(tmp_path, again)
    cache.build()
    cache.conditions([0, 10])
    assert again.encoded == []


def test_an_interrupted_build_goes_on_behind_its_last_finished_shard(tmp_path):
    family = Family()
    family.fail_after = 6  # in the second shard of four
    with pytest.raises(KeyboardInterrupt):
        cache_of(tmp_path, family).build()
    again = Family()
    cache = cache_of(tmp_path, again)
    cache.build()
    assert again.encoded == list(PROMPTS.prompts[4:])
    expected = EncodedOnTheFly(again, PROMPTS).conditions(range(11))
    assert torch.equal(cache.conditions(range(11)).tensors["embeds"], expected.tensors["embeds"])


def test_a_build_with_another_shard_size_keeps_what_is_there(tmp_path):
    cache_of(tmp_path, Family()).build()
    again = Family()
    cache = ConditionCache(tmp_path, again, PROMPTS, 2, shard_size=5)
    cache.build()
    assert again.encoded == []
    assert cache.conditions([9]).tensors["ids"].tolist() == [[9, 16]]


def test_a_truncated_shard_is_made_again(tmp_path):
    cache = cache_of(tmp_path, Family())
    cache.build()
    shard = cache.folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    again = Family()
    cache_of(tmp_path, again).build()
    assert again.encoded == list(PROMPTS.prompts[4:8])


def test_other_weights_prompts_vocabulary_or_length_never_share_a_cache(tmp_path):
    changed = [Family() for _ in range(5)]
    with torch.no_grad():
        changed[1].encoder.weight[3, 2] += 1e-6
    changed[2].pipeline.components["tokenizer"].vocabulary["a"] = 99
    changed[3].pipeline.components["tokenizer"].model_max_length = 7
    prints = [conditions_fingerprint(family, PROMPTS) for family in changed[:4]]
    prints.append(conditions_fingerprint(changed[4], PromptSet((*PROMPTS.prompts[:-1], "zz"))))
    assert len(set(prints)) == 5
    assert conditions_fingerprint(Family(), PROMPTS) == prints[0]
    for family in changed[:2]:
        cache = cache_of(tmp_path, family)
        cache.build()
        assert len(family.encoded) == 11
        assert torch.equal(cache.conditions([3]).tensors["embeds"][0, 0], family.encoder.weight[3])
    assert len(list(tmp_path.iterdir())) == 2


def test_without_an_encoder_the_labels_themselves_are_the_fingerprint():
    class Labels(Family):
        offset = 0

        def text_modules(self) -> dict[str, nn.Module]:
            return {}

        def encode_prompts(self, prompts: Sequence[str]) -> Condition:
            return Condition({"class_labels": torch.tensor([self.offset + ord(p[0]) for p in prompts])})

    first, second = Labels(), Labels()
    second.offset = 1
    assert conditions_fingerprint(first, PROMPTS) != conditions_fingerprint(second, PROMPTS)


def test_progress_counts_all_prompts(tmp_path):
    seen = []
    cache_of(tmp_path, Family()).build(lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_a_full_disk_is_a_user_error_and_finished_shards_stay(tmp_path, monkeypatch):
    from stepdistill.data import cache as module

    save, calls = module.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", full)
    cache = cache_of(tmp_path, Family())
    with pytest.raises(UserError, match="No space left"):
        cache.build()
    assert sorted(p.name for p in cache.folder.iterdir()) == ["index.json", "shard-00000.safetensors"]


def test_a_cache_that_was_not_built_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        cache_of(tmp_path, Family()).conditions([0])


def test_a_number_outside_the_prompts_is_refused(tmp_path):
    cache = cache_of(tmp_path, Family())
    cache.build()
    for number in (11, -1):
        with pytest.raises(IndexError):
            cache.conditions([number])
