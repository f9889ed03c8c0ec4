"""The end of a run: the student as stock files, checked and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.adapters import SharedNetwork, copy_into
from stepdistill.denoiser import AdapterWeights, OwnWeights
from stepdistill.export.lora import difference_lora, export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.verify import ImageRequest, verify_export
from stepdistill.sampling import student_samples


if TYPE_CHECKING:
    from stepdistill.bench.report import Report
    from stepdistill.cast import RoleState
    from stepdistill.console import Display
    from stepdistill.families.base import ModelFamily
    from stepdistill.objectives.base import InferenceSpec
    from stepdistill.recipe import Recipe
    from stepdistill.run_folder import RunFolder


CHECKED_IMAGES = 2
NOISE_SEED = 0


def export_student(
    recipe: Recipe, family: ModelFamily, student: RoleState, spec: InferenceSpec | None,
    folder: RunFolder, display: Display,
) -> tuple[Path | None, Path | None]:  # fmt: skip
    """Writes pipeline/ and lora/ as the recipe asks => their folders.

    Raises:
        ExportMismatchError: a fresh process with plain Diffusers does not get the student's images.
    """
    network = merged_network(family, student)
    facts = {
        "method": recipe.stages[-1].objective.name,
        "teacher": recipe.teacher,
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
    }
    pipeline = lora = None
    if recipe.export.pipeline:
        pipeline = export_pipeline(family, network, spec, folder.pipeline, facts=facts)
        if spec is not None:
            difference = check(family, network, spec, pipeline, None)
            display.say(f"{pipeline}: a fresh process with plain Diffusers differs by at most {difference:.1e}")
    if recipe.export.lora and spec is not None and spec.embeds_guidance:
        display.say("lora/: left out, since a LoRA has no layer for the guidance scale that this student takes as an "
                    "input")  # fmt: skip
    elif recipe.export.lora and spec is not None and family.supports_lora_loading:
        lora = _export_lora(recipe, family, student, network, spec, folder, facts, display)
    return pipeline, lora


def merged_network(family: ModelFamily, student: RoleState) -> nn.Module:
    """A plain network that computes what the student computes."""
    network = family.plain_network(embeds_guidance=family.guidance_weight in student.tensors)
    if student.lora is None:
        trained = {name for name, _ in network.named_parameters()}
        buffers = {name: value for name, value in family.network().state_dict().items() if name not in trained}
        network.load_state_dict({**buffers, **student.tensors})
        return network
    network.load_state_dict(family.network().state_dict())
    shared = SharedNetwork(network)
    shared.add("student", student.lora)
    copy_into(shared.parameters("student"), student.tensors, "the student's adapter")
    merged = family.plain_network()
    merged.load_state_dict(AdapterWeights(shared, "student").plain_state())
    return merged


@torch.no_grad()
def check(family: ModelFamily, network: nn.Module, spec: InferenceSpec, folder: Path, lora: Path | None) -> float:
    """Largest difference between the student in memory and its export in a fresh process, images in [0, 1].

    Both sides compute on the CPU in float32, where equal operations give equal bits.
    """
    device = family.device
    family.pipeline.to("cpu")
    generator = torch.Generator("cpu").manual_seed(NOISE_SEED)
    noise = torch.randn((CHECKED_IMAGES, *family.latent_shape()), generator=generator)
    prompts = _some_prompts(family)
    # DiTPipeline takes no latents: it draws its noise first, from the generator that the request seeds.
    given = noise if family.takes_latents else None
    request = ImageRequest(prompts, spec.num_steps, spec.guidance_scale, given, NOISE_SEED, spec.eta)
    try:
        expected = in_memory(family, network.to("cpu"), spec, noise, prompts)
        return verify_export(folder, expected, request, lora=lora)
    finally:
        family.pipeline.to(device)
        network.to(device)


def in_memory(
    family: ModelFamily, network: nn.Module, spec: InferenceSpec, noise: Tensor, prompts: list[str]
) -> Tensor:
    """The student's images (B, 3, H, W) in [0, 1] from given noise."""
    condition = family.encode_prompts(prompts)
    torch.manual_seed(NOISE_SEED)  # the pipeline draws the noise between steps from a generator of this seed
    x0 = student_samples(family.denoiser(OwnWeights(network)), noise, condition, spec)
    return family.decode_latents(x0)


def _some_prompts(family: ModelFamily) -> list[str]:
    return [str(i) for i in range(CHECKED_IMAGES)] if family.name == "dit" else ["a red circle", "a blue square"]


def _export_lora(
    recipe: Recipe, family: ModelFamily, student: RoleState, network: nn.Module, spec: InferenceSpec,
    folder: RunFolder, facts: Mapping[str, Any], display: Display,
) -> Path:  # fmt: skip
    if student.lora is not None:
        lora = export_lora(family, student.tensors, rank=student.lora.rank, alpha=student.lora.alpha,
                           folder=folder.lora, spec=spec, facts=facts)  # fmt: skip
        difference = check(family, network, spec, Path(family.path), lora)
        display.say(f"{lora}: a fresh process with plain Diffusers differs by at most {difference:.1e}")
        return lora
    rank = recipe.export.lora_rank
    difference_state = difference_lora(family.network(), network, rank)
    display.say(f"lora/: rank {rank} keeps {1 - difference_state.residual:.0%} of the full student's change; "
                "train with weights: {lora: ...} for a LoRA that loses nothing")  # fmt: skip
    lost = {"residual": difference_state.residual, "untargeted": difference_state.untargeted}
    return export_lora(family, difference_state.state, rank=rank, alpha=rank, folder=folder.lora, spec=spec,
                       facts={**facts, **lost})  # fmt: skip


def measure(recipe: Recipe, spec: InferenceSpec | None, folder: RunFolder, display: Display, device: str) -> Report:
    """Benchmarks teacher and student, prints the table, writes report/."""
    from stepdistill.bench.benchmark import Provenance, run_benchmark
    from stepdistill.bench.generate import ModelUnderTest
    from stepdistill.bench.prompts import ShapesProtocol

    config = recipe.bench
    assert config is not None, "the caller asks only if the recipe does"
    steps, guidance = config.teacher_steps, config.teacher_guidance
    teacher = ModelUnderTest(f"teacher, {steps} steps", recipe.teacher, steps, guidance)
    seconds = folder.train_seconds()
    path = str(folder.pipeline)
    if spec is None:
        models = [ModelUnderTest(f"{recipe.name}, {steps} steps", path, steps, guidance, train_seconds=seconds)]
    else:
        one = replace(teacher, name="teacher, 1 step", steps=1, scheduler="lcm")
        plural = "step" if spec.num_steps == 1 else "steps"
        models = [teacher, one, ModelUnderTest(f"student, {spec.num_steps} {plural}", path, spec.num_steps,
                                               spec.guidance_scale, eta=spec.eta, train_seconds=seconds)]  # fmt: skip
    protocol = ShapesProtocol(config.prompts, config.images_per_prompt, evaluator=config.evaluator)
    with display.counting("measuring") as count:
        report = run_benchmark(
            models, protocol=protocol, output=folder.report, device=device,
            batch_size=config.batch_size, seed=config.seed,
            on_progress=lambda p: count(p.done, p.total),
            provenance=Provenance(recipe.name, recipe.sha256),
        )  # fmt: skip
    display.table(report.to_table())
    return report
