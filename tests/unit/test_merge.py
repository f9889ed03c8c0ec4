"""The mean of two students: its arithmetic, and the command that writes it as a pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from stepdistill import cli
from stepdistill.cast import Cast
from stepdistill.checkpoint import tensors_equal
from stepdistill.errors import UserError
from stepdistill.export.lora import export_lora, fold_alpha
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families import load_family
from stepdistill.merge import Student, blend, merge
from stepdistill.objectives.base import InferenceSpec
from stepdistill.objectives.vsd import VSD
from tests.families.test_export import student_of
from tests.tiny import LORA, scramble


ONE, FOUR = InferenceSpec((999,)), InferenceSpec((999, 749, 499, 249))
State = dict[str, Tensor]


class Made(NamedTuple):
    """Two students of one base: folders, and what their networks hold."""

    base: str
    full: Path
    lora: Path
    folded: Path
    states: dict[str, State]


def state_of(folder: str | Path) -> State:
    return dict(load_family(str(folder)).network().state_dict())


@pytest.fixture(scope="module")
def made(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("students")
    family = load_family(sd_folder)
    base = {name: tensor.clone() for name, tensor in family.network().state_dict().items()}
    full = student_of(family)
    facts = {"method": "vsd", "teacher": "t", "recipe": "full", "recipe_sha256": "abc"}
    export_pipeline(family, full, ONE, root / "full/pipeline", facts=facts)
    cast = Cast(family, VSD().roles(), lora={"student": LORA})
    scramble(cast.parameters("student"), scale=0.1)
    lora = dict(cast.parameters("student"))
    folded = cast.plain_state("student")
    network = family.plain_network()
    network.load_state_dict(folded)
    cast.release()
    export_lora(family, lora, rank=LORA.rank, alpha=LORA.alpha, folder=root / "small/lora", spec=ONE)
    export_pipeline(family, network, ONE, root / "small/pipeline", facts={"method": "sum"})
    states = {"base": base, "full": dict(full.state_dict()), "folded": folded, "lora": lora}
    return Made(sd_folder, root / "full/pipeline", root / "small/lora", root / "small/pipeline", states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_ends_are_the_students_themselves_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"x": torch.randn(1000, generator=generator).to(dtype), "n": torch.tensor(n)} for n in (3, 4))
    assert tensors_equal(blend(a, b, 1.0), a)
    assert torch.equal(blend(a, b, 0.0)["x"], b["x"])
    assert blend(a, b, 0.25)["x"].dtype == dtype


def test_between_them_is_the_weighted_mean() -> None:
    a, b = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, -2.0])}
    assert blend(a, b, 0.25)["x"].tolist() == [2.5, -1.0]


@pytest.mark.parametrize(
    "b", [{"x": torch.zeros(2)}, {"x": torch.zeros(3), "y": torch.zeros(1)}, {"z": torch.zeros(3)}]
)
def test_networks_of_other_shapes_are_refused(b: State) -> None:
    with pytest.raises(UserError, match=r"not alike.*merge students of one base"):
        blend({"x": torch.zeros(3)}, b, 0.5)


@pytest.mark.parametrize(("rank", "alpha", "factor"), [(64, 128, 2.0), (64, 108, 1.6875), (256, 512, 2.0)])
def test_a_lora_changes_the_weight_by_alpha_over_rank(rank: int, alpha: float, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lora = {"l.lora_A.weight": torch.randn(rank, 5, generator=generator),
            "l.lora_B.weight": torch.randn(4, rank, generator=generator)}  # fmt: skip
    folded = fold_alpha(lora, rank=rank, alpha=alpha)
    product = folded["l.lora_B.weight"] @ folded["l.lora_A.weight"]
    expected = factor * lora["l.lora_B.weight"] @ lora["l.lora_A.weight"]
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("as_lora", [True, False], ids=["lora", "pipeline"])
def test_a_full_student_and_a_lora_of_one_base_meet_in_between(made: Made, tmp_path: Path, as_lora: bool) -> None:
    """theta_0 + lambda (theta_A - theta_0) + (1 - lambda) (alpha / rank) B A."""
    second = Student(made.base, str(made.lora)) if as_lora else Student(str(made.folded))
    merged = state_of(merge(Student(str(made.full)), second, 0.3, tmp_path / "merged"))
    base, full, lora = (made.states[name] for name in ("base", "full", "lora"))
    changed = 0
    for name, tensor in merged.items():
        expected = base[name] + 0.3 * (full[name] - base[name])
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in lora:
            down, up = lora[f"{layer}.lora_A.weight"].detach(), lora[f"{layer}.lora_B.weight"].detach()
            delta = torch.einsum("or,r...->o...", up.flatten(1), down)
            expected = expected + 0.7 * (LORA.alpha / LORA.rank) * delta
            changed += int(delta.abs().max() > 1e-3)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert changed > 5


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["stepdistill", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(("weight", "student"), [(1, "full"), (0, "folded")])
def test_the_command_writes_a_stock_pipeline_and_its_ends_are_the_students(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    weight: int, student: str,
) -> None:  # fmt: skip
    output = tmp_path / "merged"
    first = made.full.parent  # a run's folder
    assert call(monkeypatch, "merge", first, made.folded, "--weight", weight, "--output", output) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    assert tensors_equal(dict(pipeline.unet.state_dict()), made.states[student])
    facts = json.loads((output / "distillation_config.json").read_text())
    assert (facts["method"], facts["merged"], facts["weight"]) == ("merge", ["full", "small"], weight)
    assert (facts["steps"], facts["timesteps"], facts["guidance_scale"]) == (1, [999], 1.0)
    assert "recipe_sha256" not in facts
    model = cli._parse_model(str(output))
    assert (model.steps, model.guidance_scale) == (1, 1.0), "it is called like the students"
    pipeline.scheduler.set_timesteps(1)
    assert pipeline.scheduler.timesteps.tolist() == [999]


def test_the_command_takes_a_base_with_a_lora(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    words = ["merge", f"{made.base},lora={made.lora}", made.full, "--weight", "1", "--output", output]
    assert call(monkeypatch, *words) == 0
    for name, tensor in state_of(output).items():
        torch.testing.assert_close(tensor, made.states["folded"][name], rtol=1e-5, atol=1e-6)
    facts = json.loads((output / "distillation_config.json").read_text())
    assert facts["timesteps"] == [999]
    assert type(StableDiffusionPipeline.from_pretrained(output).scheduler).__name__ == "LCMScheduler"


def test_students_of_other_steps_or_of_another_kind_are_refused(
    made: Made, dit_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = load_family(made.base)
    export_pipeline(family, student_of(family), FOUR, tmp_path / "four", facts={})
    for other, message in ((tmp_path / "four", "called differently (timesteps: [999] and [999, 749"),
                           (dit_folder, "networks of different kinds")):  # fmt: skip
        assert call(monkeypatch, "merge", made.full, other, "--output", tmp_path / "merged") == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_a_lora_where_none_can_be_loaded_is_refused(made: Made, dit_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DiTPipeline cannot load a LoRA"):
        merge(Student(dit_folder, str(made.lora)), Student(str(made.full)), 0.5, tmp_path / "merged")
    with pytest.raises(UserError, match="cannot be loaded as a LoRA"):
        merge(Student(made.base, str(tmp_path)), Student(str(made.full)), 0.5, tmp_path / "merged")
