"""The end of a run: the student as stock files, checked and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.adapters import SharedNetwork, copy_into
from stepdistill.data.sampler import StockSampler
from stepdistill.denoiser import AdapterWeights, OwnWeights
from stepdistill.export.adapter import export_adapter
from stepdistill.export.lora import add_lora, difference_lora, export_lora
from stepdistill.export.pipeline import atomic_folder, export_pipeline, forget_origin
from stepdistill.export.verify import ImageRequest, verify_export
from stepdistill.run_folder import STUDENT
from stepdistill.sampling import student_samples


if TYPE_CHECKING:
    from stepdistill.bench.report import Report
    from stepdistill.cast import RoleState
    from stepdistill.console import Display
    from stepdistill.families.base import ModelFamily
    from stepdistill.network_shape import NetworkShape
    from stepdistill.objectives.base import InferenceSpec
    from stepdistill.recipe import Recipe
    from stepdistill.run_folder import RunFolder


CHECKED_IMAGES = 2
NOISE_SEED = 0
OWN_STEPS = 2  # of the check of students that keep the teacher's scheduler, which may take any number


def export_student(
    recipe: Recipe, family: ModelFamily, student: RoleState, spec: InferenceSpec | None,
    folder: RunFolder, display: Display, *, stage: int = -1,
) -> tuple[Path | None, Path | None]:  # fmt: skip
    """Writes pipeline/ and lora/ as the recipe asks => their folders; of an adapter, adapter/ instead of both.

    `stage` is the number of the recipe's stage that the student comes from.

    Raises:
        ExportMismatchError: a fresh process with plain Diffusers does not get the student's images.
    """
    beside_teacher = recipe.export.lora or (spec is not None and spec.adapter is not None)
    facts: dict[str, Any] = {
        "method": recipe.stages[stage].objective.name,
        "teacher": recipe.teacher if family.stored or not beside_teacher else keep_teacher(family, folder),
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
    }
    if spec is not None and spec.adapter is not None:
        export_adapter(family, student.tensors, spec, folder.adapter, facts=facts)
        display.say(f"{folder.adapter}: an adapter for any checkpoint of this architecture; stepdistill.load_adapter "
                    "puts it on a stock pipeline")  # fmt: skip
        return None, None
    shape = recipe.student.shape
    network = merged_network(family, student, shape)
    if shape is not None:
        facts |= {"shape": asdict(shape), "parameters": sum(p.numel() for p in network.parameters())}
    pipeline = lora = None
    if recipe.export.pipeline:
        pipeline = export_pipeline(family, network, spec, folder.pipeline, facts=facts)
        if spec is not None:
            difference = check(family, network, spec, pipeline, None)
            display.say(f"{pipeline}: a fresh process with plain Diffusers differs by at most {difference:.1e}")
    if recipe.export.lora and spec is not None and shape is not None:
        display.say("lora/: left out, since the student is smaller than the network that a LoRA would be for")
    elif recipe.export.lora and spec is not None and spec.embeds_guidance:
        display.say("lora/: left out, since a LoRA has no layer for the guidance scale that this student takes as an "
                    "input")  # fmt: skip
    elif recipe.export.lora and spec is not None and family.supports_lora_loading:
        lora = _export_lora(recipe, family, student, network, spec, folder, facts, display)
    return pipeline, lora


def keep_teacher(family: ModelFamily, folder: RunFolder) -> str:
    """Where plain Diffusers finds the teacher: where it came from, or else a copy in the run's folder teacher/."""
    if family.stored:
        return family.path
    if not (folder.teacher / "model_index.json").is_file():
        with atomic_folder(folder.teacher, marker="model_index.json") as new:
            family.pipeline.save_pretrained(new, safe_serialization=True)
            forget_origin(new)
    return str(folder.teacher)


def known_teacher(recipe: Recipe, folder: RunFolder) -> str:
    """The same of a run that is over, also of one with several students; a teacher that was not kept is only named."""
    places = [folder.teacher, *sorted(folder.path.glob(f"{STUDENT}*/{folder.teacher.name}"))]
    return next((str(place) for place in places if (place / "model_index.json").is_file()), recipe.teacher)


def merged_network(family: ModelFamily, student: RoleState, shape: NetworkShape | None = None) -> nn.Module:
    """A plain network that computes what the student computes, which is of a shape of its own or the teacher's."""
    network = family.plain_network(embeds_guidance=family.guidance_weight in student.tensors, shape=shape)
    if shape is not None:
        copy_into(dict(network.named_parameters()), student.tensors, "the student")
        return network
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
    given = family.pipeline_latents(noise) if family.takes_latents else None
    steps = OWN_STEPS if spec.sampler == "own" else spec.num_steps
    request = ImageRequest(prompts, steps, spec.guidance_scale, given, NOISE_SEED, spec.eta, family.image_size)
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
    student = family.denoiser(OwnWeights(network))
    if spec.sampler == "own":
        scheduler, told = family.pipeline.scheduler, spec.told(condition)
        x0 = StockSampler(student, {}, name=scheduler, steps=OWN_STEPS)(noise, told, told).sample
    else:
        x0 = student_samples(student, noise, condition, spec)
    return family.decode_latents(x0)


def _some_prompts(family: ModelFamily) -> list[str]:
    return [str(i) for i in range(CHECKED_IMAGES)] if family.name == "dit" else ["a red circle", "a blue square"]


def _export_lora(
    recipe: Recipe, family: ModelFamily, student: RoleState, network: nn.Module, spec: InferenceSpec,
    folder: RunFolder, facts: Mapping[str, Any], display: Display,
) -> Path:  # fmt: skip
    if student.lora is not None:
        lora = export_lora(family, student.tensors, rank=student.lora.rank, alpha=student.lora.alpha,
                           folder=folder.lora, spec=spec, facts=facts, naming=recipe.export.lora_format)  # fmt: skip
        difference = check(family, network, spec, Path(keep_teacher(family, folder)), lora)
        display.say(f"{lora}: a fresh process with plain Diffusers differs by at most {difference:.1e}")
        return lora
    rank = recipe.export.lora_rank
    difference_state = difference_lora(family.network(), network, rank)
    display.say(f"lora/: rank {rank} keeps {1 - difference_state.residual:.0%} of the full student's change; "
                "train with weights: {lora: ...} for a LoRA that loses nothing")  # fmt: skip
    lost = {"residual": difference_state.residual, "untargeted": difference_state.untargeted}
    lora = export_lora(family, difference_state.state, rank=rank, alpha=rank, folder=folder.lora, spec=spec,
                       facts={**facts, **lost}, naming=recipe.export.lora_format)  # fmt: skip
    # Not the student's images, but those of what the file keeps of it.
    kept = family.plain_network()
    kept.load_state_dict(family.network().state_dict())
    add_lora(kept, difference_state.state)
    difference = check(family, kept, spec, Path(keep_teacher(family, folder)), lora)
    display.say(f"{lora}: a fresh process with plain Diffusers differs by at most {difference:.1e} from what is kept")
    return lora


def measure(recipe: Recipe, spec: InferenceSpec | None, folder: RunFolder, display: Display, device: str) -> Report:
    """Benchmarks teacher and student, prints the table, writes report/."""
    from stepdistill.bench.benchmark import Provenance, run_benchmark
    from stepdistill.bench.generate import ModelUnderTest
    from stepdistill.bench.prompts import ShapesProtocol

    config = recipe.bench
    assert config is not None, "the caller asks only if the recipe does"
    steps, guidance = config.teacher_steps, config.teacher_guidance
    teacher_path = known_teacher(recipe, folder)
    side = recipe.data.size  # at which the student was trained
    teacher = ModelUnderTest(f"teacher, {steps} steps", teacher_path, steps, guidance, height=side, width=side)
    seconds = folder.train_seconds()
    several, adapter = recipe.multi_student, None
    path = str(folder.pipeline if several is None else folder.path)
    if spec is None:
        models = [replace(teacher, name=f"{recipe.name}, {steps} steps", path=path, train_seconds=seconds)]
    else:
        one = replace(teacher, name="teacher, 1 step", steps=1, scheduler="lcm")
        plural = "step" if spec.num_steps == 1 else "steps"
        if spec.sampler == "own":
            one = replace(teacher, name=f"teacher, {steps} steps, no guidance", guidance_scale=1.0)
        if spec.adapter is not None:
            path, adapter = teacher_path, str(folder.adapter)
        name = "student" if several is None else f"{several.students} students"
        rule = None if several is None else several.rule
        student = ModelUnderTest(f"{name}, {spec.num_steps} {plural}", path, spec.num_steps, spec.guidance_scale,
                                 eta=spec.eta, train_seconds=seconds, adapter=adapter, rule=rule, height=side,
                                 width=side)  # fmt: skip
        models = [teacher, one, student]
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
