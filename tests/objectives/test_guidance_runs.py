"""Guidance adapters, LoRAs and embeddings, from the recipe to what is delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from stepdistill import load_adapter
from stepdistill.bench.generate import ModelUnderTest, call_options, generate_images, load_pipeline
from stepdistill.cli_models import model_under_test
from stepdistill.data.cache import weights_fingerprint
from stepdistill.data.pair_maker import PairSettings, make_pairs
from stepdistill.data.prompts import PromptSet
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.agd import AGD
from stepdistill.recipe import Recipe
from stepdistill.run import RunResult, export, train
from tests.objectives.test_guidance_input import recipe_of
from tests.tiny import tiny_recipe, trainer_of, weights_of


WAY = PairSettings(count=4, steps=4, guidance=(1.0, 6.0), states="all", predictions=True)


def agd_recipe(teacher: str, output: Path, further: float | None = None, **objective: Any) -> Recipe:
    """Four iterations of adapter guidance distillation on stored paths of two prompts.

    `further` is the learning rate of four more where their ends are noised.
    """
    prompts = PromptSet(("a", "b"))  # of which the tiny tokenizer knows that they are not empty
    make_pairs(load_family(teacher), prompts, output.parent / "way", WAY)
    content = tiny_recipe(teacher, output, checkpoints={"every": 2, "keep": 3})
    (output.with_suffix(".txt")).write_text("a\nb\n")
    content["data"]["pairs"] = str(output.parent / "way")
    content["export"] = {"pipeline": True, "lora": True}
    content["health"] = {"every": 2, "prompts": 1, "teacher_steps": 2, "grace": 10}
    content["previews"] = {"every": 4, "prompts": 1}
    options = {"name": "agd", "width": 8, "steps": 2, "call_guidance": 4.0, **objective}
    players = {"student": {"optimizer": {"lr": 1e-2}, "ema": 0.5}}
    content["stages"] = [{"objective": options, "steps": 4, "batch_size": 4, "players": players}]
    if further is not None:
        noised = {**options, "learn_on": "pairs", "guidance": [1.0, 6.0]}
        players = {"student": {"optimizer": {"lr": further, "weight_decay": 0.0}}}
        content["stages"].append({"objective": noised, "steps": 4, "batch_size": 4, "players": players})
    return Recipe.from_mapping(content)


@pytest.fixture(scope="module")
def adapted(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(agd_recipe(sd_folder, tmp_path_factory.mktemp("agd") / "run"))


def image(pipeline: Any, prompt: Any = "a") -> Tensor:
    made = pipeline(prompt, num_inference_steps=2, guidance_scale=1, output_type="np",
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    return torch.from_numpy(made.images)


def test_a_run_leaves_one_file_that_a_stock_pipeline_takes(adapted: RunResult, sd_folder: str) -> None:
    assert adapted.pipeline is None and adapted.lora is None and adapted.adapter is not None
    assert not (adapted.folder / "pipeline").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.set_progress_bar_config(disable=True)
    plain, rows = image(pipeline), []
    adapter = load_adapter(pipeline, adapted.adapter)
    assert adapter.guidance == 4.0 and type(pipeline) is StableDiffusionPipeline
    pipeline.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    assert not torch.equal(image(pipeline), plain)
    assert rows == [1, 1], "one network call a step"
    adapter.remove()
    assert torch.equal(image(pipeline), plain)


def test_what_lies_beside_the_file_says_how_to_call_it(adapted: RunResult, sd_folder: str) -> None:
    assert adapted.adapter is not None
    facts = json.loads((adapted.adapter / "distillation_config.json").read_text())
    assert (facts["guidance_scale"], facts["steps"], facts["method"], facts["teacher"]) == (4.0, 2, "agd", sd_folder)
    assert "timesteps" not in facts, "it has no schedule of its own"
    card = (adapted.folder / "README.md").read_text()
    assert 'load_adapter(pipe, "adapter", guidance=4)' in card and "## Other programs" not in card
    assert len(list((adapted.folder / "previews").iterdir())) == 1
    log = [json.loads(line) for line in (adapted.folder / "metrics.jsonl").read_text().splitlines()]
    assert "health/contrast" in log[1] and log[0]["agd"] > 0


def test_the_benchmark_tells_the_adapter_the_scale_and_calls_the_network_once(
    adapted: RunResult, sd_folder: str
) -> None:
    model = model_under_test(str(adapted.folder), {"guidance_scale": 2.0})
    assert (model.path, model.adapter, model.guidance_scale) == (sd_folder, str(adapted.adapter), 2.0)
    other = model_under_test(sd_folder, {"adapter": str(adapted.adapter), "steps": 3})
    assert (other.adapter, other.guidance_scale, other.steps) == (str(adapted.adapter), 4.0, 3)
    made = {}
    for scale in (2.0, 6.0):
        model = ModelUnderTest("adapted", sd_folder, 2, scale, adapter=str(adapted.adapter))
        pipeline = load_pipeline(model)
        assert call_options(pipeline, model)["guidance_scale"] == 1
        made[scale] = generate_images(pipeline, ["a"], model=model, images_per_prompt=1)
    assert made[2.0].nfe == 2
    assert not torch.equal(made[2.0].images, made[6.0].images)


def test_a_checkpoint_is_exported_like_the_finished_adapter(adapted: RunResult, tmp_path: Path) -> None:
    last, first = (export(adapted.folder, number, tmp_path / number).adapter for number in ("4", "2"))
    assert adapted.adapter is not None and last is not None and first is not None
    states = [load_file(folder / "adapter.safetensors") for folder in (adapted.adapter, last, first)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
@pytest.mark.parametrize("form", ["attention", "offset"])
def test_an_adapter_learns_beside_every_family_and_the_base_keeps_its_bits(
    name: str, form: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family = request.getfixturevalue(name)
    prompts = PromptSet(("3", "7") if name == "dit" else ("a", "b"))
    sampler = "euler" if name == "sd3" else "ddim"
    pairs = make_pairs(family, prompts, tmp_path / "way", PairSettings(**{**vars(WAY), "sampler": sampler}))
    before = weights_fingerprint(family.network())
    trainer = trainer_of(family, AGD(form, 8), steps=30, batch_size=16, player={"options": {"lr": 1e-2}})
    trainer.batches.pairs = stream_of(pairs, family)
    start = weights_of(trainer)
    losses: list[float] = []
    trainer.on_step = lambda progress: losses.append(progress.losses["agd"])
    trainer.run()
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert weights_fingerprint(family.network()) == before
    assert not any(p.requires_grad for p in family.network().parameters())
    moved = weights_of(trainer)
    assert all(not torch.equal(moved[name], value) for name, value in start.items() if "/sites." in name)


def stream_of(pairs: Any, family: Any) -> Any:
    from stepdistill.data.cache import EncodedOnTheFly
    from stepdistill.data.pairs import PairStream

    return PairStream(pairs, EncodedOnTheFly(family, pairs.prompts))


def test_pairs_without_the_teachers_answers_are_refused_before_anything_is_encoded(
    sd_folder: str, tmp_path: Path
) -> None:
    recipe = agd_recipe(sd_folder, tmp_path / "run")
    make_pairs(load_family(sd_folder), PromptSet(("a",)), tmp_path / "plain", PairSettings(steps=2))
    content = recipe.model_dump(mode="json")
    content["data"]["pairs"] = str(tmp_path / "plain")
    with pytest.raises(UserError, match="do not hold what the teacher said on the way"):
        train(Recipe.from_mapping(content))


def test_an_adapter_that_the_recipe_makes_a_lora_is_refused(sd_folder: str, tmp_path: Path) -> None:
    content = agd_recipe(sd_folder, tmp_path / "run").model_dump(mode="json")
    content["stages"][0]["players"] = {"student": {"weights": {"lora": {"rank": 2}}}}
    with pytest.raises(UserError, match="'student' is an adapter beside the network and cannot be a LoRA"):
        train(Recipe.from_mapping(content))


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_guidance_goes_into_a_lora_of_the_same_network(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    teacher = request.getfixturevalue(f"{name}_folder")
    content = recipe_of(teacher, tmp_path / "run").model_dump(mode="json")
    prompts = "37" if name == "dit" else "ab"
    (tmp_path / "run.txt").write_text("\n".join(prompts))
    for number, file in enumerate(sorted((tmp_path / "images").glob("*.txt"))):
        file.write_text(prompts[number % 2])
    content["stages"][0]["objective"] = {"name": "guidance", "guidance": 4.0, "steps": 2}
    content["stages"][0]["players"] = {
        "student": {"weights": {"lora": {"rank": 2}}, "optimizer": {"lr": 1e-2}}
    }  # fmt: skip
    result = train(Recipe.from_mapping(content))  # compares both exports with the student in a fresh process
    assert result.pipeline is not None and (result.lora is not None) == (name == "sd")
    files = [Path(folder) / "scheduler/scheduler_config.json" for folder in (result.pipeline, teacher)]
    assert len({file.read_text() for file in files}) == 1
    prompt = [3] if name == "dit" else "a"
    pipelines = [DiffusionPipeline.from_pretrained(folder) for folder in (result.pipeline, teacher)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    student = image(pipelines[0], prompt)
    assert not torch.equal(student, image(pipelines[1], prompt))
    if result.lora is not None:
        pipelines[1].load_lora_weights(str(result.lora))
        torch.testing.assert_close(image(pipelines[1], prompt), student, rtol=0, atol=1e-4)


def test_guidance_becomes_an_input_of_a_stock_network(sd_folder: str, tmp_path: Path) -> None:
    content = recipe_of(sd_folder, tmp_path / "run").model_dump(mode="json")
    content["stages"][0]["objective"] = {
        "name": "guidance", "guidance": [1.0, 6.0], "embed_guidance": True, "call_guidance": 3.0, "steps": 2,
    }  # fmt: skip
    result = train(Recipe.from_mapping(content))
    assert result.pipeline is not None and result.lora is None
    pipeline = StableDiffusionPipeline.from_pretrained(result.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.time_cond_proj_dim == 256
    rows: list[int] = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    made = [pipeline("a", num_inference_steps=3, guidance_scale=scale, output_type="np",
                     generator=torch.Generator().manual_seed(0)).images for scale in (2.0, 5.0)]  # fmt: skip
    assert rows == [1] * 6 and abs(made[0] - made[1]).max() > 1e-4


@pytest.mark.parametrize(("rate", "farthest"), [(1e-9, 1e-7), (1e-2, 1.0)])
def test_a_second_stage_on_noised_samples_goes_on_with_the_adapter_of_the_first(
    rate: float, farthest: float, sd_folder: str, tmp_path: Path
) -> None:
    result = train(agd_recipe(sd_folder, tmp_path / "run", further=rate))
    first = export(result.folder, "stage-0", tmp_path / "first").adapter
    assert result.adapter is not None and first is not None
    before, after = (load_file(folder / "adapter.safetensors") for folder in (first, result.adapter))
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert farthest / 1000 < moved + 1e-9 < farthest, "as far as four steps at this rate go"
