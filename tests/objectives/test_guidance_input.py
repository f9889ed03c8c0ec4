"""Students that take the guidance scale as an input: from the first bit of training to a stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from stepdistill import finish
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.draw import Avoid, draw
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.sd import guidance_embedding
from stepdistill.objectives.base import Frozen, InferenceSpec, Recorded, Role, Trained
from stepdistill.recipe import Recipe
from stepdistill.run import RunResult, export, train
from tests.tiny import LORA, scramble, tiny_recipe


WEIGHT = "time_embedding.cond_proj.weight"
ROLES: dict[str, Role] = {
    "teacher": Frozen(),
    "student": Trained(embeds_guidance=True),
    "target": Recorded("student"),
    "critic": Trained(),
}
CALLED = 4.5


def test_a_scale_is_embedded_with_the_bits_of_the_stock_pipeline(sd: ModelFamily) -> None:
    scales = [1.0, 1.1, 4.5, 7.3, 8.0, 14.9]
    for channels in (32, 256):
        ours = guidance_embedding(torch.tensor(scales, dtype=torch.float64), channels)
        for scale, row in zip(scales, ours, strict=True):
            stock = sd.pipeline.get_guidance_scale_embedding(torch.tensor([scale - 1]), embedding_dim=channels)
            assert torch.equal(row, stock[0]), scale


def test_a_condition_carries_one_scale_or_one_for_each_row_exactly() -> None:
    condition = Condition({"label": torch.zeros(3)})
    assert condition.with_guidance(7.3).tensors["guidance"].tolist() == [7.3, 7.3, 7.3]
    assert condition.with_guidance(torch.tensor([1.0, 2.0, 3.0])).tensors["guidance"].tolist() == [1.0, 2.0, 3.0]
    assert condition.with_guidance(2.0)[torch.tensor([1])].tensors["guidance"].tolist() == [2.0]
    assert set(condition.tensors) == {"label"}
    with pytest.raises(RuntimeError):
        condition.with_guidance(torch.ones(2))


def said(cast: Cast, role: str, scale: float | Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x_t, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.3, 0.9], dtype=torch.float64)
    condition = cast.family.encode_prompts(["red", "a ring"])
    told = condition if scale is None else condition.with_guidance(scale)
    with torch.no_grad():
        return cast.denoiser(role)(x_t, t, told).native


def test_the_student_starts_as_the_teacher_at_every_scale_and_then_listens_to_it(sd: ModelFamily) -> None:
    cast = Cast(sd, ROLES)
    teacher = said(cast, "teacher", None)
    for role in ("student", "target"):
        assert all(torch.equal(said(cast, role, scale), teacher) for scale in (1.0, 3.0, 15.0))
    scramble({WEIGHT: cast.parameters("student")[WEIGHT]})
    at = {scale: said(cast, "student", scale) for scale in (3.0, 15.0)}
    assert (at[3.0] - at[15.0]).abs().max() > 1e-3
    mixed = said(cast, "student", torch.tensor([3.0, 15.0]))
    for row, scale in enumerate((3.0, 15.0)):
        torch.testing.assert_close(mixed[row], at[scale][row], rtol=1e-5, atol=1e-6)
    assert torch.equal(said(cast, "teacher", None), teacher)
    assert sd.network_config.time_cond_proj_dim is None


def test_only_the_roles_that_ask_for_it_have_the_input(sd: ModelFamily) -> None:
    cast = Cast(sd, ROLES)
    assert {role for role in ("student", "target", "critic") if WEIGHT in cast.parameters(role)} == {
        "student", "target",
    }  # fmt: skip
    assert WEIGHT not in sd.network().state_dict()


def test_a_teacher_that_has_the_input_hands_its_weights_on(sd: ModelFamily) -> None:
    cast = Cast(sd, ROLES)
    scramble({WEIGHT: cast.parameters("student")[WEIGHT]})
    network = sd.plain_network(embeds_guidance=True)
    network.load_state_dict(cast.plain_state("student"))
    sd.pipeline.register_modules(unet=network)
    again = Cast(sd, ROLES)
    assert torch.equal(again.parameters("student")[WEIGHT], cast.parameters("student")[WEIGHT])


def test_a_stage_may_start_from_weights_without_the_input_and_from_those_with_it(sd: ModelFamily) -> None:
    plain = Cast(sd, {"student": Trained()})
    scramble(plain.parameters("student"), seed=1)
    first = Cast(sd, ROLES, starts={"student": plain.state("student")})
    assert torch.equal(said(first, "student", 5.0), said(plain, "student", None))
    scramble(first.parameters("student"), seed=2)
    second = Cast(sd, ROLES, starts={"student": first.state("student")})
    assert torch.equal(said(second, "student", 5.0), said(first, "student", 5.0))
    with pytest.raises(UserError, match=f"first '{WEIGHT}'"):
        Cast(sd, {"student": Trained()}, starts={"student": first.state("student")})


def test_a_lora_cannot_have_the_input(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"'student' takes the guidance scale.*weights: full, or.*guidance: false"):
        Cast(sd, ROLES, lora={"student": LORA})


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_network_that_cannot_have_the_input_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match="cannot take a guidance scale as an input; set"):
        Cast(request.getfixturevalue(name), ROLES)


def test_sana_says_which_pipeline_would_be_needed(sana_folder: str) -> None:
    with pytest.raises(UserError, match=r"only SanaSprintPipeline does.*embed_guidance: false"):
        Cast(load_family(sana_folder), ROLES)


def recipe_of(teacher: str, output: Path, **objective: Any) -> Recipe:
    """Three iterations of LCM on images from a folder."""
    images = output.parent / "images"
    images.mkdir(exist_ok=True)
    for number, caption in enumerate("abcd"):
        Image.new("RGB", (16, 16), (40 * number, 200 - 30 * number, 90)).save(images / f"{caption}.png")
        (images / f"{caption}.txt").write_text(caption)
    content = tiny_recipe(teacher, output, checkpoints={"every": 1, "keep": 3})
    content["data"] |= {"images": str(images), "size": 16, "count": 8}
    content["export"] = {"pipeline": True, "lora": True}
    content["health"] = {"every": 2, "prompts": 1, "teacher_steps": 2, "grace": 10}
    content["previews"] = {"every": 2, "prompts": 1}
    options = {"name": "lcm", "guidance": [2.0, 7.0], "call_guidance": CALLED, **objective}
    players = {"student": {"optimizer": {"lr": 1e-2}, "ema": 0.5}}
    content["stages"] = [{"objective": options, "steps": 3, "batch_size": 2, "players": players}]
    return Recipe.from_mapping(content)


@pytest.fixture(scope="module")
def run(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A whole run; its export has been compared with the student in memory in a fresh process."""
    return train(recipe_of(sd_folder, tmp_path_factory.mktemp("lcm") / "run"))


def test_a_run_leaves_a_stock_pipeline_that_is_called_once_a_step_at_any_scale(run: RunResult) -> None:
    assert run.pipeline is not None and run.lora is None
    pipeline = StableDiffusionPipeline.from_pretrained(run.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.time_cond_proj_dim == 256
    assert pipeline.unet.get_parameter(WEIGHT).abs().max() > 1e-3, "it has been trained"
    rows = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))

    def image(scale: float) -> Tensor:
        return pipeline("a", num_inference_steps=4, guidance_scale=scale, output_type="pt",
                        generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    assert (image(CALLED) - image(2.0)).abs().max() > 1e-3
    assert rows == [1] * 8


def test_what_lies_beside_the_pipeline_says_how_to_call_it(run: RunResult) -> None:
    facts = json.loads((run.pipeline / "distillation_config.json").read_text())
    assert (facts["guidance_scale"], facts["embeds_guidance"], facts["steps"]) == (CALLED, True, 4)
    assert facts["timesteps"] == [999, 759, 499, 259]
    card = (run.folder / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=4.5)" in card
    assert "guidance scale is an input of this network" in card
    assert "CFG 1" not in card


def test_the_student_was_watched_with_the_scale_that_it_is_called_with(run: RunResult) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert "health/contrast" in lines[1]
    assert len(list((run.folder / "previews").iterdir())) == 2
    spec = InferenceSpec((999,), guidance_scale=3.0, embeds_guidance=True)
    assert spec.told(Condition({"label": torch.zeros(1)})).tensors["guidance"].tolist() == [3.0]


def test_a_checkpoint_is_exported_like_the_finished_student(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "check", lambda *_: 0.0)  # compared with a fresh process in the run itself
    again = export(run.folder, "3", tmp_path / "out")
    networks = [load_family(str(folder)).network().state_dict() for folder in (run.pipeline, again.pipeline)]
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    assert not torch.equal(networks[0][WEIGHT], load_family(
        str(export(run.folder, "1", tmp_path / "first").pipeline)).network().state_dict()[WEIGHT])  # fmt: skip


def test_a_negative_prompt_that_the_pipeline_would_ignore_is_refused(run: RunResult, tmp_path: Path) -> None:
    model = ModelUnderTest("student", str(run.pipeline), 4, CALLED)
    with pytest.raises(UserError, match=r"takes the guidance scale as an input.*--nasa"):
        list(draw(model, ["a"], tmp_path / "out", avoid=Avoid("b")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("teacher", "players", "message"),
    [
        ("sd_folder", {"student": {"weights": {"lora": {"rank": 2}}}}, "weights: full"),
        ("sd3_folder", {}, "cannot take a guidance scale"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_encoded(
    teacher: str, players: dict[str, Any], message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_of(request.getfixturevalue(teacher), tmp_path / "run")
    content = recipe.model_dump(mode="json")
    content["stages"][0]["players"] = players
    with pytest.raises(UserError, match=message):
        train(Recipe.from_mapping(content))
    assert not (tmp_path / "run" / "cache").exists()
