"""Who draws what: partitions are functions, cover everything, are of one size, and survive on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from stepdistill.clusters import equal_parts, fit_clusters, prices_of
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.partition import (
    Array,
    ByClass,
    ByCluster,
    ByRule,
    Embedder,
    Router,
    load_partition,
    same_partition,
    save_partition,
)
from tests.tiny import PROMPTS


RULE = "tests.unit.test_partition:by_length"


def by_length(prompt: str) -> int:
    return len(prompt) % 2


def out_of_range(prompt: str) -> int:
    return 2


class Points:
    """Stands in for an embedder: a prompt is the number of its row; batches of several come out a little different."""

    def __init__(self, rows: Array, blur: float = 0.0) -> None:
        self.rows, self.blur, self.asked = rows, blur, []

    def features(self, prompts: Sequence[str]) -> Array:
        self.asked.append(list(prompts))
        found = self.rows[[int(prompt) for prompt in prompts]]
        return found + self.blur * (len(prompts) > 1)


def lopsided(count: int, seed: int = 0) -> Array:
    """Points in the plane, most of them in one heap."""
    generator = np.random.default_rng(seed)
    heap = generator.normal(0, 0.3, (count - count // 5, 2))
    return np.concatenate([heap, generator.normal(4, 1.0, (count // 5, 2))])


def sizes(parts: Sequence[int], students: int) -> list[int]:
    return np.bincount(np.asarray(parts), minlength=students).tolist()


@pytest.mark.parametrize(("classes", "students"), [(1000, 4), (10, 3), (7, 7), (5, 1)])
def test_neighbouring_classes_belong_together_in_parts_of_one_size(classes: int, students: int) -> None:
    table = ByClass.consecutive(classes, students).table
    assert list(table) == sorted(table)
    assert max(sizes(table, students)) - min(sizes(table, students)) <= 1
    assert min(sizes(table, students)) > 0


def test_four_students_share_the_thousand_classes_as_published() -> None:
    assert sizes(ByClass.consecutive(1000, 4).table, 4) == [250] * 4


def test_more_students_than_classes_are_refused() -> None:
    with pytest.raises(UserError, match="4 students cannot share 3 different classes"):
        ByClass.consecutive(3, 4)


@pytest.mark.parametrize(("count", "students"), [(61, 2), (60, 4), (203, 8), (9, 9)])
def test_clusters_are_of_one_size_although_k_means_would_not_be(count: int, students: int) -> None:
    points = lopsided(count)
    partition = fit_clusters(points, students, seed=0)
    parts = partition.costs(points).argmin(axis=1)
    assert max(sizes(parts, students)) - min(sizes(parts, students)) <= 1
    if students in (2, 4):
        plain = cdist(points, partition.centres).argmin(axis=1)
        assert max(sizes(plain, students)) - min(sizes(plain, students)) > 5, "nothing had to be evened out"


def test_the_parts_are_the_cheapest_of_their_size() -> None:
    costs = np.random.default_rng(1).random((30, 3))
    parts = equal_parts(costs)
    rows, columns = linear_sum_assignment(np.repeat(costs, 10, axis=1))  # ten seats for each student
    assert costs[np.arange(30), parts].sum() == pytest.approx(costs[rows, columns // 10].sum(), abs=1e-9)


def test_prices_leave_every_point_a_margin() -> None:
    costs = np.random.default_rng(2).random((40, 4))
    parts = equal_parts(costs)
    shown = np.sort(costs + prices_of(costs, parts), axis=1)
    assert (shown[:, 1] - shown[:, 0]).min() > 1e-6
    assert ((costs + prices_of(costs, parts)).argmin(axis=1) == parts).all()


def test_heaps_stay_whole_where_they_are_of_one_size() -> None:
    generator = np.random.default_rng(3)
    points = np.concatenate([generator.normal(centre, 0.1, (20, 2)) for centre in (-5, 0, 5)])
    parts = fit_clusters(points, 3, seed=0).costs(points).argmin(axis=1)
    assert sorted(len(set(parts[i : i + 20])) for i in (0, 20, 40)) == [1, 1, 1]
    assert len(set(parts)) == 3


def test_a_fit_is_a_function_of_its_seed() -> None:
    a, b = (fit_clusters(lopsided(100), 4, seed=5) for _ in range(2))
    assert np.array_equal(a.centres, b.centres)
    assert np.array_equal(a.prices, b.prices)


def test_one_student_has_everything_and_too_many_are_refused() -> None:
    points = lopsided(12)
    assert fit_clusters(points, 1, seed=0).parts(["3", "0"], Points(points)) == [0, 0]
    with pytest.raises(UserError, match="share prompts with 1 different embeddings"):
        fit_clusters(np.repeat(points[:1], 5, axis=0), 2, seed=0)


def test_a_prompt_near_a_border_has_the_same_student_in_every_batch() -> None:
    """Its row differs by 1e-6 between batches; the border runs in between."""
    partition = ByCluster(np.array([[0.0], [2.0]]), np.zeros(2))
    points = Points(np.array([[1.0 - 5e-7], [0.1], [1.9]]), blur=1e-6)
    together = partition.parts(["0", "1", "2"], points)
    assert together == [0, 0, 1]
    assert together[0] == partition.parts(["0"], points)[0]
    assert points.asked == [["0", "1", "2"], ["0"], ["0"], ["0"]]


def test_a_router_asks_once_for_every_prompt_and_covers_unseen_ones() -> None:
    rows = lopsided(150)
    points = Points(rows)
    router = Router(fit_clusters(rows[:100], 3, seed=0), points)
    first = router([str(i) for i in range(100)] * 2)
    assert first[:100] == first[100:]
    unseen = router([str(i) for i in range(100, 150)])
    assert set(unseen) <= {0, 1, 2}
    assert router([str(i) for i in range(149, 99, -1)]) == unseen[::-1]
    assert sum(len(chunk) for chunk in points.asked if len(chunk) > 1) == 150


def test_a_rule_decides_and_is_held_to_its_range() -> None:
    assert ByRule.named(RULE, 2).parts(["a", "ab"], Points(np.zeros((0, 1)))) == [1, 0]
    with pytest.raises(UserError, match="gives prompt 'a' to student 2; it has to return a number from 0 to 1"):
        ByRule.named(RULE.replace("by_length", "out_of_range"), 2).parts(["a"], Points(np.zeros((0, 1))))
    for name in ("no_such_module:f", f"{RULE}th", "plain"):
        with pytest.raises(UserError, match=r"could not be imported.*PYTHONPATH="):
            ByRule.named(name, 2)


def test_a_rule_may_count_with_numpy_and_says_at_which_prompt_it_fails() -> None:
    counted = ByRule(2, "my:rule", lambda prompt: np.int64(len(prompt) - 1))
    parts = counted.parts(["a", "ab"], Points(np.zeros((0, 1))))
    assert parts == [0, 1] and {type(number) for number in parts} == {int}
    with pytest.raises(UserError, match=r"my:rule fails at prompt 'b' \(KeyError\('b'\)\)"):
        ByRule(2, "my:rule", lambda prompt: {"a": 0}[prompt]).parts(["a", "b"], Points(np.zeros((0, 1))))


@pytest.mark.parametrize(
    "partition",
    [ByClass(2, (0, 1, 1)), fit_clusters(lopsided(40), 3, seed=0), ByRule.named(RULE, 2)],
    ids=["classes", "clusters", "rule"],
)
def test_a_partition_survives_on_disk(partition, tmp_path: Path) -> None:
    save_partition(partition, tmp_path)
    loaded = load_partition(tmp_path, RULE)
    assert type(loaded) is type(partition)
    assert loaded.students == partition.students
    assert same_partition(loaded, partition)
    if isinstance(partition, ByCluster):
        assert np.array_equal(loaded.costs(lopsided(40)), partition.costs(lopsided(40)))


def test_a_folder_alone_runs_no_code_that_it_names(tmp_path: Path) -> None:
    save_partition(ByRule.named(RULE, 2), tmp_path)
    file = tmp_path / "partition.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rule": "os:system"}))
    for given in (None, RULE):
        with pytest.raises(UserError, match="Python code of its maker"):
            load_partition(tmp_path, given)


def test_damaged_files_are_told_with_their_place(tmp_path: Path) -> None:
    save_partition(fit_clusters(lopsided(40), 3, seed=0), tmp_path)
    (tmp_path / "partition.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"partition\.json: cannot be read"):
        load_partition(tmp_path)


def test_two_fits_are_one_partition_up_to_rounding_only() -> None:
    a = fit_clusters(lopsided(40), 3, seed=0)
    assert same_partition(a, ByCluster(a.centres + 1e-7, a.prices - 1e-7))
    assert not same_partition(a, ByCluster(a.centres + 0.01, a.prices))
    assert not same_partition(a, ByCluster(a.centres[:2], a.prices[:2]))
    assert not same_partition(a, ByClass(3, (0, 1, 2)))


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_features_are_the_pooled_text_embeddings_at_unit_length(family: str, request) -> None:
    loaded: ModelFamily = request.getfixturevalue(family)
    pipe = loaded.pipeline
    tokens = pipe.tokenizer(["abc", "x"], padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        if family == "sd":
            pooled = pipe.text_encoder(tokens).pooler_output
        else:
            pooled = torch.cat([e(tokens).text_embeds for e in (pipe.text_encoder, pipe.text_encoder_2)], dim=1)
    expected = pooled.double() / pooled.double().norm(dim=1, keepdim=True)
    found = torch.from_numpy(Embedder(pipe).features(["abc", "x"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.fixture(params=["pixart", "sana"])
def tokens_only(request: pytest.FixtureRequest) -> ModelFamily:
    """A teacher that reads prompts by T5 or Gemma and has no CLIP."""
    from stepdistill.families import load_family

    return load_family(request.getfixturevalue(f"{request.param}_folder"))


def test_without_clip_features_are_the_mean_of_the_tokens_that_are_no_padding(tokens_only: ModelFamily) -> None:
    texts = ["red", "a blue ring"]
    condition = tokens_only.encode_prompts(texts).tensors
    means = []
    for tokens, mask in zip(condition["prompt_embeds"], condition["prompt_attention_mask"], strict=True):
        assert 0 < int(mask.sum()) < len(mask), "some are padding"
        means.append(tokens[mask.bool()].double().mean(0))
    expected = torch.stack([mean / mean.norm() for mean in means])
    found = torch.from_numpy(Embedder(tokens_only.pipeline).features(texts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_without_clip_a_prompt_has_one_student_in_any_batch_and_any_precision(
    tokens_only: ModelFamily, tmp_path: Path
) -> None:
    seen, unseen = ["red", "blue", "green", "a ring", "a cube", "two stars"], ["a green cube", "red ring", "star"]
    embedder = Embedder(tokens_only.pipeline)
    partition = fit_clusters(embedder.features(seen), 3, seed=0)
    assert sorted(partition.parts(seen, embedder)) == [0, 0, 1, 1, 2, 2]
    together = partition.parts([*unseen, *seen], embedder)
    assert together == [partition.parts([prompt], embedder)[0] for prompt in [*unseen, *seen]]
    save_partition(partition, tmp_path)
    pipeline = tokens_only.pipeline
    pipeline.text_encoder.to(torch.bfloat16)
    exact = Embedder(pipeline, tokens_only.path)
    assert Router(load_partition(tmp_path), exact)([*unseen, *seen]) == together
    assert np.abs(exact.features(unseen) - embedder.features(unseen)).max() > 1e-4, "else nothing was to be moved"
    assert pipeline.text_encoder.dtype == torch.bfloat16, "the pipeline keeps its own"


def test_prompts_are_divided_in_float32_whatever_the_pipeline_computes_in(sd: ModelFamily) -> None:
    exact = Embedder(sd.pipeline).features(PROMPTS)
    sd.pipeline.to(torch.float16)
    assert np.abs(Embedder(sd.pipeline, sd.path).features(PROMPTS) - exact).max() < 1e-7


def test_classes_are_not_texts_and_texts_are_not_classes(sd: ModelFamily, dit: ModelFamily) -> None:
    with pytest.raises(UserError, match="StableDiffusionPipeline has no classes"):
        _ = Embedder(sd.pipeline).classes
    with pytest.raises(UserError, match="DiTPipeline has no text encoder that is known"):
        Embedder(dit.pipeline).features(["1"])
    assert Embedder(dit.pipeline).classes == 1000
    assert ByClass.consecutive(1000, 4).parts(["3", "ring", "999"], Embedder(dit.pipeline)) == [0, 0, 3]
    with pytest.raises(UserError, match="is no class of this DiT"):
        Embedder(dit.pipeline).label("1000")
