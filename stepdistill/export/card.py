"""The model card of a run: how to call the student, what was measured, how it was made."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.export.pipeline import FACTS_FILE
from stepdistill.files import write_whole, writing


if TYPE_CHECKING:
    from stepdistill.objectives.base import InferenceSpec


PIPELINE_FOLDER, LORA_FOLDER, ADAPTER_FOLDER = "pipeline", "lora", "adapter"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


# field of a report's row => (heading, how a value is printed); a column without any value is left out
COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("Model", str),
    "nfe": ("NFE", "{:g}".format),
    "fid": ("FID", "{:.2f}".format),
    "kid": ("KID", "{:.4f}".format),
    "clip_score": ("CLIP score", "{:.2f}".format),
    "caption_accuracy": ("Caption accuracy", _share),
    "images_all_correct": ("Images all correct", _share),
    "diversity": ("Diversity", _share),
    "ms_per_image": ("ms/image", "{:.1f}".format),
}


def write_card(
    run_folder: Path,
    *,
    recipe: Mapping[str, Any],
    spec: InferenceSpec | None,
    report: Any | None = None,
    picture: str | None = None,
) -> Path:
    """Writes README.md for a run: snippets that work as they stand, the measured table, the schedule, the recipe.

    Args:
        run_folder: holds `pipeline/` and, where there is one, `lora/`, with their distillation_config.json.
        recipe: the resolved recipe; `name` and `teacher` are used by name.
        spec: how the student is called; None if it keeps the teacher's scheduler.
        report: what was measured, a dataclass or mapping with `rows` (dataclasses or mappings) and, if there,
            `device`, `date` and `protocol`.
        picture: an image to show, relative to the run folder.

    Returns:
        The file.

    Raises:
        UserError: it could not be written.
    """
    from huggingface_hub import ModelCard

    made = PIPELINE_FOLDER if spec is None or spec.adapter is None else ADAPTER_FOLDER
    facts = _read_facts(run_folder / made)
    lora = _read_facts(run_folder / LORA_FOLDER) if (run_folder / LORA_FOLDER).is_dir() else None
    sections = [
        _title(recipe, spec),
        f"![samples]({picture})" if picture else "",
        _usage(recipe, spec, facts, lora),
        _measured(report),
        _other_programs(spec, facts),
        _origin(recipe, facts),
    ]
    header = _card_data(recipe, facts, with_lora=lora is not None).to_yaml()
    card = ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n")
    path = run_folder / "README.md"
    with writing(path):
        write_whole(path, lambda new: new.write_text(str(card), encoding="utf-8"))
    return path


def markdown_table(rows: Sequence[Any]) -> str:
    """Rows of a report (dataclasses or mappings) => a Markdown table of the columns that hold a value."""
    values = [_as_mapping(row) for row in rows]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in values)]
    lines = ["| " + " | ".join(COLUMNS[key][0] for key in keys) + " |"]
    lines.append("|" + "|".join(" --- " if key == "model" else " ---: " for key in keys) + "|")
    for row in values:
        cells = ["-" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict: it would turn the rows of a report into copies.
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(value)


def _read_facts(folder: Path) -> Mapping[str, Any]:
    file = folder / FACTS_FILE
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _card_data(recipe: Mapping[str, Any], facts: Mapping[str, Any], *, with_lora: bool) -> Any:
    from huggingface_hub import ModelCardData

    from_text = _takes_text(facts)
    teacher = str(recipe["teacher"])
    # The hub refuses a card whose base_model is not a model there; a local teacher is named in the text.
    on_hub = _HUB_ID.fullmatch(teacher) is not None and not Path(teacher).exists()
    tags = ["text-to-image"] if from_text else ["class-conditional"]
    tags += ["diffusers", "distillation", "few-step", "stepdistill"]
    return ModelCardData(
        base_model=teacher if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image" if from_text else None,
        tags=tags + (["lora"] if with_lora else []),
    )


def _takes_text(facts: Mapping[str, Any]) -> bool:
    return bool(facts.get("pipeline") != "DiTPipeline")


def _title(recipe: Mapping[str, Any], spec: InferenceSpec | None) -> str:
    name, teacher = recipe.get("name", "student"), recipe["teacher"]
    if spec is None:
        return f"# {name}\n\nA diffusion model trained from `{teacher}`; called with the scheduler it came with."
    steps = "one network call" if len(spec.timesteps) == 1 else f"{len(spec.timesteps)} network calls"
    return f"# {name}\n\nDistilled from `{teacher}`: an image takes {steps}, in plain Diffusers."


def _usage(
    recipe: Mapping[str, Any],
    spec: InferenceSpec | None,
    facts: Mapping[str, Any],
    lora: Mapping[str, Any] | None,
) -> str:
    if spec is not None and spec.adapter is not None:
        return _adapter_usage(recipe, spec, facts)
    call = _call(spec, facts) if spec else ""
    given = '"a red circle above a blue square"' if _takes_text(facts) else "class_labels=[0]"
    image = f"image = pipe({', '.join(p for p in (given, call) if p)}).images[0]"
    text = f"""## Usage

In this folder, with nothing but Diffusers:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{PIPELINE_FOLDER}")
{image}
```"""
    if spec is not None:
        text += f"\n\nThe schedule is in the folder. Always pass `{call}`: other values are defaults for the teacher."
    if spec is not None and spec.embeds_guidance:
        text += (
            "\n\nThe guidance scale is an input of this network: every scale that it was trained with costs one call "
            "of it a step, 1 means no guidance, and negative prompts do nothing."
        )
    unseeded = not _takes_text(facts) or facts.get("scheduler") == "FlowMatchLCMScheduler"
    if spec is not None and unseeded and len(spec.timesteps) > 1:
        text += (
            "\n\nFor reproducible images call `torch.manual_seed(seed)` first: this pipeline uses its `generator` for "
            "the starting noise alone."
        )
    return text if lora is None else f"{text}\n\n{_lora_usage(recipe, lora, image)}"


def _adapter_usage(recipe: Mapping[str, Any], spec: InferenceSpec, facts: Mapping[str, Any]) -> str:
    given = '"a red circle above a blue square"' if _takes_text(facts) else "class_labels=[0]"
    return f"""## Usage

One file beside the stock pipeline of `{recipe["teacher"]}`, or of any other checkpoint of its architecture:

```python
from diffusers import DiffusionPipeline
from stepdistill import load_adapter

pipe = DiffusionPipeline.from_pretrained("{recipe["teacher"]}")
adapter = load_adapter(pipe, "{ADAPTER_FOLDER}", guidance={spec.guidance_scale:g})
image = pipe({given}, num_inference_steps={spec.num_steps}, guidance_scale=1).images[0]
```

The adapter is told the guidance scale; the pipeline is called with guidance_scale=1, which is one network call a step,
in as many steps as one likes. `adapter.guidance = 5` changes the scale, `adapter.remove()` takes the adapter off.
LoRAs can be loaded beside it."""


def _call(spec: InferenceSpec, facts: Mapping[str, Any]) -> str:
    call = f"num_inference_steps={len(spec.timesteps)}, guidance_scale={spec.guidance_scale:g}"
    # Other schedulers do not know eta, and DiTPipeline, which takes no text, does not either.
    passes_eta = spec.eta and facts.get("scheduler") == "TCDScheduler" and _takes_text(facts)
    return f"{call}, eta={spec.eta:g}" if passes_eta else call


def _lora_usage(recipe: Mapping[str, Any], lora: Mapping[str, Any], image: str) -> str:
    scheduler = lora.get("scheduler")
    names = ", ".join(sorted(filter(None, ["DiffusionPipeline", scheduler])))
    lines = [f"from diffusers import {names}\n", f'pipe = DiffusionPipeline.from_pretrained("{recipe["teacher"]}")']
    lines.append(f'pipe.load_lora_weights("{LORA_FOLDER}")')
    if scheduler:
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained("{LORA_FOLDER}", subfolder="scheduler")')
    text = "As a LoRA on the teacher:\n\n```python\n" + "\n".join([*lines, image]) + "\n```"
    if lora.get("residual"):
        text += (
            f"\n\nThe student was trained in full; the LoRA of rank {lora.get('rank')} keeps all but "
            f"{_share(lora['residual'])} of the change (in the Frobenius norm), so it is an approximation of "
            f"`{PIPELINE_FOLDER}/`."
        )
    return text


def _measured(report: Any | None) -> str:
    if report is None:
        return ""
    content = _as_mapping(report)
    notes = [f"{key}: {content[key]}" for key in ("device", "date") if content.get(key)]
    protocol = _as_mapping(content.get("protocol") or {})
    notes += [f"{key}: {value}" for key, value in protocol.items() if isinstance(value, int | float | str)]
    note = "\n\nNFE: network calls per image; a doubled batch for guidance counts twice."
    return f"## Measured\n\n{markdown_table(content['rows'])}{note}" + (f" ({'; '.join(notes)}.)" if notes else "")


def _other_programs(spec: InferenceSpec | None, facts: Mapping[str, Any]) -> str:
    if spec is None or not _takes_text(facts):
        return ""
    if spec.sampler == "own":  # nothing about its schedule is special
        return ""
    if spec.embeds_guidance:
        return "## Other programs\n\nOnly those that hand the guidance scale to the network, as Diffusers does."
    sampler = {"stochastic": "`lcm`", "deterministic": "`euler`", "tcd": f"`tcd` with eta {spec.eta:g}"}[spec.sampler]
    timesteps = ", ".join(f"{t:g}" for t in facts.get("timesteps", spec.timesteps))
    sigmas = ", ".join(f"{sigma:.4f}" for sigma in facts.get("sigmas", ()))
    return f"""## Other programs

Sampler {sampler}, schedule `sgm_uniform`, {len(spec.timesteps)} steps, CFG 1. If the schedule is entered by hand
(or if a picture looks noisy, check it first): timesteps {timesteps}, that is
sigmas {f"{sigmas}, " if sigmas else ""}0."""


def _origin(recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    import yaml

    version = facts.get("toolkit_version")
    text = yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False).rstrip()
    return f"""## How it was made

With stepdistill{f" {version}" if version else ""} from `{recipe["teacher"]}`, whose licence and limits apply to this
model as well.

```yaml
{text}
```"""
