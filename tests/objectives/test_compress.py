"""Distillation into smaller networks: what is compared with what, what it becomes without, and a whole run."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.smaller import Plan
from stepdistill.network_shape import NetworkShape
from stepdistill.objectives.base import Batch, Step
from stepdistill.objectives.compress import Compress, layer_error
from stepdistill.objectives.denoising import Denoising
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.small_students import shaped_roles
from tests.oracles.oracle import SCHEDULE, Roles, constant, gaussian
from tests.tiny import scramble, tiny_recipe


ALL = Compress(attention_weight=1.0)
SMALL = NetworkShape(channels=0.5)
LABELS = ["3", "7", "1"]


def cast_of(family: ModelFamily, shape: NetworkShape | None = None, **options: Any) -> Cast:
    return Cast(family, shaped_roles(ALL, shape), **options)


def batch_of(family: ModelFamily) -> Batch:
    prompts = LABELS if family.name == "dit" else ["a", "b", "c"]
    generator = torch.Generator().manual_seed(1)
    shape = family.latent_shape()
    return Batch(family.encode_prompts(prompts), family.null_condition(3), shape, torch.device("cpu"),
                 latents=torch.randn(3, *shape, generator=generator))  # fmt: skip


def terms_of(objective: Compress, cast: Any, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return dict(objective.loss(cast, batch, Step(0)).terms)


@pytest.fixture(params=["sd", "dit", "sd3"])
def family(request: pytest.FixtureRequest) -> ModelFamily:
    found: ModelFamily = request.getfixturevalue(request.param)
    return found


# ---- what it is made of --------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_is_left_with_the_denoising_error(family: ModelFamily) -> None:
    cast, batch = cast_of(family), batch_of(family)
    terms = terms_of(ALL, cast, batch)
    assert list(terms) == ["task", "output", "feature", "attention"]
    assert terms["output"] == terms["feature"] == terms["attention"] == 0
    torch.manual_seed(2)
    assert torch.equal(sum(terms.values()), Denoising().loss(cast, batch, Step(0)).total)
    scramble(cast.parameters("student"))
    assert all(term > 0 for term in terms_of(ALL, cast, batch).values())


def test_without_the_teachers_terms_it_is_plain_denoising_and_the_teacher_is_not_asked(sd: ModelFamily) -> None:
    cast, batch = cast_of(sd, SMALL), batch_of(sd)
    plain = Compress(output_weight=0.0, feature_weight=0.0, min_snr_gamma=5.0, condition_dropout=0.5)
    calls: list[int] = []
    handle = sd.network().register_forward_hook(lambda *_: calls.append(1))
    terms = terms_of(plain, cast, batch)
    torch.manual_seed(2)
    expected = Denoising(min_snr_gamma=5.0, condition_dropout=0.5).loss(cast, batch, Step(0)).total
    assert list(terms) == ["task"]
    assert torch.equal(terms["task"], expected)
    assert calls == []
    terms_of(ALL, cast, batch)
    handle.remove()
    assert calls == [1], "one pass of the teacher gives output and features"


def test_all_blocks_and_all_self_attentions_are_compared(family: ModelFamily) -> None:
    found = ALL.layers(cast_of(family))
    names = {group: [own for own, _ in pairs] for group, pairs in found.items()}
    assert all(own == teachers for pairs in found.values() for own, teachers in pairs)
    if family.name == "sd":
        assert names["feature"] == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
        attentions = sum(name.endswith("attn1") for name, _ in family.network().named_modules())
        assert len(names["attention"]) == attentions == 4
        assert "mid_block.attentions.0.transformer_blocks.0.attn1" in names["attention"]
    elif family.name == "dit":
        assert names == {"feature": ["transformer_blocks.0"], "attention": ["transformer_blocks.0.attn1"]}
    else:
        assert names["feature"] == ["transformer_blocks.0.norm1", "transformer_blocks.1.norm1"]
        assert names["attention"] == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def test_blocks_of_a_student_without_inner_stages_are_compared_with_the_teachers_at_the_same_place(
    sd: ModelFamily,
) -> None:
    cast = cast_of(sd, NetworkShape(remove=("mid_block", "down_blocks.1")))
    # Nothing is downsampled any more behind the first stage, so it is the teacher's last layer before that.
    expected = [("down_blocks.0", "down_blocks.0.resnets.0"), ("up_blocks.0", "up_blocks.1")]
    assert Compress().layers(cast) == {"feature": expected}
    assert all(term.isfinite() and term > 0 for term in terms_of(Compress(), cast, batch_of(sd)).values())


def test_a_narrower_layer_is_compared_with_the_channels_that_it_has_kept() -> None:
    plan = Plan(share=Fraction(1, 2))
    teachers = torch.tensor([1.0, 9.0, 3.0, 9.0]).reshape(1, 4, 1, 1)
    own = torch.tensor([1.0, 5.0], requires_grad=True)
    error = layer_error(plan, own.reshape(1, 2, 1, 1), teachers)
    error.backward()
    assert error.item() == pytest.approx(((1 - 1) ** 2 + (5 - 3) ** 2) / 2)
    assert own.grad is not None
    assert own.grad.tolist() == [0.0, 2.0]
    with pytest.raises(UserError, match=r"features of shape \(3, 1, 1\), which cannot be compared"):
        layer_error(plan, torch.zeros(1, 3, 1, 1), teachers)


def test_weights_scale_their_terms(family: ModelFamily) -> None:
    cast, batch = cast_of(family, SMALL), batch_of(family)
    plain = terms_of(ALL, cast, batch)
    scaled = terms_of(Compress(task_weight=2.0, output_weight=3.0, feature_weight=0.5, attention_weight=0.25),
                      cast, batch)  # fmt: skip
    factors = {"task": 2.0, "output": 3.0, "feature": 0.5, "attention": 0.25}
    for name, factor in factors.items():
        torch.testing.assert_close(scaled[name], factor * plain[name])
        assert plain[name] > 0


def test_the_teachers_side_carries_no_gradient_and_all_of_the_student_learns(family: ModelFamily) -> None:
    cast, batch = cast_of(family, SMALL), batch_of(family)
    with cast.trainable(["student"]):
        sum(terms_of(ALL, cast, batch).values()).backward()
    assert [name for name, p in cast.parameters("student").items() if p.grad is None] == []
    assert all(p.grad is None for p in family.network().parameters())


def test_checkpointing_does_not_change_the_gradients_of_features(sd_folder: str) -> None:
    found = []
    for checkpointing in (False, True):
        family = load_family(sd_folder)
        cast = cast_of(family, SMALL, checkpointing=checkpointing)
        cast.denoiser("student").weights.network.train()
        with cast.trainable(["student"]):
            sum(terms_of(ALL, cast, batch_of(family)).values()).backward()
        found.append({name: p.grad for name, p in cast.parameters("student").items()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


@pytest.mark.parametrize("weights", [{"task_weight": -1.0}, dict.fromkeys(("task_weight", "output_weight",
                                                                         "feature_weight"), 0.0)])  # fmt: skip
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="no weight may be negative, and one must be above 0"):
        Compress(**weights)  # type: ignore[arg-type]


def test_attention_that_is_not_there_cannot_be_compared(sd: ModelFamily) -> None:
    remove = ("down_blocks.1.attentions", "up_blocks.0.attentions", "mid_block")
    with pytest.raises(UserError, match="attention_weight is above 0, but the student has no such layers left"):
        terms_of(ALL, cast_of(sd, NetworkShape(remove=remove)), batch_of(sd))


# ---- teacher score matching ----------------------------------------------------------------------------------------


class LineAtEachTime(nn.Module):
    """eps = a x_t + b, with numbers of its own for each timestep: all that a Gaussian's denoiser needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def line(module: LineAtEachTime) -> Denoiser:
    def call(network: Any, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        index = model_time.round().long()
        return network.a[index][:, None] * x_t + network.b[index][:, None]

    weights = OwnWeights(module)
    module.requires_grad_(True)
    return Denoiser(call, weights, SCHEDULE, "epsilon")


def test_score_matching_leads_a_small_network_to_the_teachers_posterior_mean_at_every_time() -> None:
    mean, std = 0.7, 0.5
    student = LineAtEachTime()
    cast = Roles({"teacher": gaussian(constant(mean), std), "student": line(student)})
    generator = torch.Generator().manual_seed(0)
    x0 = mean + std * torch.randn(256, 1, dtype=torch.float64, generator=generator)
    rows = Condition({"label": torch.zeros(256)})
    batch = Batch(rows, rows, (1,), torch.device("cpu"), latents=x0)
    matching = Compress(task_weight=0.0, feature_weight=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        torch.manual_seed(5)
        loss = matching.loss(cast, batch, Step(0)).total  # type: ignore[arg-type]
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(student.parameters(), lr=1, max_iter=100, tolerance_grad=1e-14,
                                  tolerance_change=1e-16, line_search_fn="strong_wolfe")  # fmt: skip
    assert closure() > 0.1
    optimizer.step(closure)
    assert closure() < 1e-12
    t = torch.arange(1, 4, dtype=torch.float64) / 3
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    slope = sigma / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(student.a.detach(), slope, rtol=0, atol=1e-5)
    torch.testing.assert_close(student.b.detach(), -slope * alpha * mean, rtol=0, atol=1e-5)


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_compressed_student_becomes_a_one_step_student_in_a_smaller_stock_pipeline(
    sd_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (200, 40 + 90 * number, 40)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("a")
    stage = {"steps": 2, "batch_size": 2, "players": {"default": {"optimizer": {"lr": 1e-3}}}}
    content = tiny_recipe(
        sd_folder, tmp_path / "run", student={"shape": {"channels": 0.5, "remove": ["mid_block"]}},
        stages=[{"objective": {"name": "compress", "attention_weight": 0.5}, **stage},
                {"objective": {"name": "dmd2", "guidance": 1.0, "critic_updates": 1}, **stage}],
        export={"pipeline": True, "lora": True},
    )  # fmt: skip
    content["data"] |= {"images": str(tmp_path / "images"), "size": 16}
    result = train(Recipe.from_mapping(content))
    assert result.pipeline is not None
    assert result.lora is None, "there is no network that it would fit"
    network = DiffusionPipeline.from_pretrained(result.pipeline).unet
    assert (list(network.config.block_out_channels), network.mid_block) == ([4, 8], None)
    facts = json.loads((result.pipeline / "distillation_config.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert (facts["shape"]["channels"], facts["shape"]["remove"], facts["steps"]) == (0.5, ["mid_block"], 1)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"task", "output", "feature", "attention"} <= logged[0].keys()
    assert "matching" in logged[-1]
