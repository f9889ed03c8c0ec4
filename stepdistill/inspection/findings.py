"""`stepdistill inspect`: from a path to what lies there, in words, with the call that is right for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.export.pipeline import FACTS_FILE
from stepdistill.guidance import HEADER
from stepdistill.inspection.calls import Call, Guess, from_facts, from_name, lora_code, network_code, pipeline_code
from stepdistill.inspection.published import recognise
from stepdistill.inspection.schedule import COUNTS, Schedule, read_schedule
from stepdistill.inspection.tensors import (
    METADATA_ALPHA,
    PICKLES,
    Header,
    base_model,
    lora_in,
    read_header,
    takes_guidance,
)


LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NETWORK_KEYS = (
    "down_blocks.", "transformer_blocks.", "joint_transformer_blocks.", "single_transformer_blocks.",
    "diffusion_model.",
)  # fmt: skip
TOLD = ("method", "teacher", "recipe", "sampler", "input_scale", "toolkit", "toolkit_version")


@dataclass(frozen=True)
class Findings:
    """What lies at a path.

    Attributes:
        kind: what it is, such as "LoRA".
        facts: (label, text), in the order to show them.
        doubts: sentences that a user should read before the first call.
        code: Python that calls it rightly; None if nothing can be recommended.
    """

    kind: str
    facts: tuple[tuple[str, str], ...]
    doubts: tuple[str, ...] = ()
    code: str | None = None

    def to_text(self) -> str:
        """For the terminal."""
        width = max((len(label) for label, _ in self.facts), default=0)
        lines = [self.kind, *(f"  {label:<{width}}  {text}" for label, text in self.facts)]
        if self.doubts:
            lines += ["", *(f"Note: {doubt}" for doubt in self.doubts)]
        if self.code is not None:
            lines += ["", "Call it so:", "", *(f"    {line}".rstrip() for line in self.code.splitlines())]
        return "\n".join(lines)


def inspect_path(path: Path) -> Findings:
    """Explains a Diffusers folder, a LoRA, a single file, an adapter, or a run's folder.

    Raises:
        UserError: nothing is there, it is none of these, or it is a pickle.
    """
    if not path.exists():
        raise UserError(f"{path}: nothing is there; give a local file or folder, since inspect never downloads")
    if path.is_file():
        return _file(path)
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    if (path / "pipeline" / "model_index.json").is_file():
        return _pipeline(path / "pipeline")
    inner = only_tensors(path)
    if inner is not None:
        return _file(inner)
    if (path / FACTS_FILE).is_file():
        return Findings("a folder of stepdistill", _told(_json(path / FACTS_FILE)))
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    if pickles:
        read_header(pickles[0])  # says why not
    raise UserError(f"{path}: holds no model_index.json and no one .safetensors file; give the folder or file of the "
                    "model itself")  # fmt: skip


def only_tensors(folder: Path) -> Path | None:
    """The safetensors file that a folder is about."""
    named = [folder / name for name in LORA_NAMES if (folder / name).is_file()]
    files = named or sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 or named else None


# ---- pipelines ---------------------------------------------------------------------------------------------------


def _pipeline(folder: Path) -> Findings:
    index, facts = _json(folder / "model_index.json"), _facts_of(folder)
    part = next((name for name in ("unet", "transformer") if (folder / name).is_dir()), None)
    network = {} if part is None else _json(folder / part / "config.json")
    schedule = _schedule(folder / "scheduler" / "scheduler_config.json", facts)
    embeds = network.get("time_cond_proj_dim") is not None or bool(network.get("guidance_embeds"))
    shown = [("pipeline", str(index.get("_class_name", "unknown")))]
    if part is not None:
        shown += _network(folder / part, network)
    shown += _schedule_facts(schedule, index)
    shown.append(("guidance", "an input of the network" if embeds else "classifier-free above 1, which doubles calls"))
    call, doubts = _call_of_pipeline(folder, facts, schedule, embeds=embeds)
    if schedule is not None and call is not None and not facts:
        doubts = [*doubts, *schedule.doubts()]
    code = None if call is None else pipeline_code(folder, call)
    return Findings("Diffusers pipeline", (*shown, *_told(facts)), tuple(doubts), code)


def _call_of_pipeline(
    folder: Path, facts: Mapping[str, Any], schedule: Schedule | None, *, embeds: bool
) -> tuple[Call | None, list[str]]:
    """By what its maker wrote down, else by its name, else by its scheduler."""
    if facts.get("steps"):
        return from_facts(facts), []
    guess = from_name(recognise(folder.resolve().name))
    if guess is not None:
        return guess.call, [guess.because]
    if schedule is not None and schedule.kind in ("LCMScheduler", "TCDScheduler"):
        counts = [count for count in schedule.visited if count <= max(COUNTS)]
        call = Call(max(counts, default=4), 8.0 if embeds else 1.0)
        return call, [f"Only its {schedule.kind} says that it is distilled; the number of steps is a guess."]
    return None, ["Nothing says that it is distilled; its pipeline's own defaults are the ones to try."]


def _network(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    files = sorted(folder.glob("*.safetensors"))
    # One variant of the weights: a folder may hold the same ones in half precision as well.
    plain = [file for file in files if ".fp16." not in file.name] or files
    headers = [read_header(file) for file in plain]
    kind = str(config.get("_class_name", "unknown"))
    if not headers:
        return [("network", kind)]
    count = sum(header.parameters for header in headers)
    dtypes = ", ".join(sorted(frozenset[str]().union(*(header.dtypes for header in headers))))
    shapes = {name: shape for header in headers for name, shape in header.shapes.items()}
    shown = [("network", f"{kind}, {count:,} parameters, {dtypes}")]
    base = base_model(shapes)
    return [*shown, ("fits", base)] if base != "unknown" else shown


def _schedule(file: Path, facts: Mapping[str, Any]) -> Schedule | None:
    counts = tuple(sorted({*COUNTS, int(facts.get("steps", 1))}))
    return read_schedule(_json(file), counts) if file.is_file() else None


def _schedule_facts(schedule: Schedule | None, index: Mapping[str, Any]) -> list[tuple[str, str]]:
    if schedule is None:
        library = (index.get("scheduler") or ["none", "none"])[:2]
        return [("scheduler", f"{library[1]} of {library[0]}, which is none of Diffusers' own")]
    shown = [("scheduler", schedule.kind), ("predicts", schedule.prediction), ("spacing", schedule.spacing)]
    for count, timesteps in schedule.visited.items():
        plural = "step " if count == 1 else "steps"
        shown.append((f"{count} {plural}", "t = " + ", ".join(f"{t:g}" for t in timesteps)))
    if schedule.first is not None:
        shown.append(("first", f"t = {schedule.first:g} of {schedule.total}"))
    return shown


# ---- single files ------------------------------------------------------------------------------------------------


def _file(file: Path) -> Findings:
    header = read_header(file)
    if HEADER in header.metadata:
        return _guidance_adapter(header)
    return _lora(header) if lora_in(header) is not None else _weights(header)


def _lora(header: Header) -> Findings:
    found = lora_in(header)
    assert found is not None, "the caller has looked"
    folder, base, facts = header.file.parent, base_model(header.shapes), _facts_of(header.file.parent)
    scales = ", ".join(f"{scale:g}" for scale in found.scales) or "unknown"
    shown = [
        ("naming", found.naming), ("layers", f"{found.layers:,}"),
        ("rank", ", ".join(map(str, found.ranks)) or "unknown"), ("alpha", found.alpha),
        ("alpha / rank", scales), ("fits", base), ("stored as", ", ".join(sorted(header.dtypes))),
    ]  # fmt: skip
    doubts = []
    if found.kind != "LoRA":
        doubts.append(f"It holds {found.kind} tensors, of which Diffusers loads some kinds only in part.")
    if found.alpha == METADATA_ALPHA and found.scales != (1.0,):
        doubts.append("Programs that do not read this metadata apply it at full scale; fold alpha / rank into lora_B.")
    guess = Guess(from_facts(facts), "") if facts.get("steps") else from_name(recognise(spoken(header)))
    if guess is None:
        doubts.append("Nothing says for which steps and guidance it was made; ask its maker.")
    elif guess.because:
        doubts.append(guess.because)
    own = "scheduler" if (folder / "scheduler" / "scheduler_config.json").is_file() else None
    if own:
        shown += _schedule_facts(_schedule(folder / own / "scheduler_config.json", facts), {})
    code = lora_code(header.file, base, guess.call if guess else None, own_scheduler=_kind_of(folder) if own else None)
    return Findings(found.kind, (*shown, *_told(facts)), tuple(doubts), code)


def _weights(header: Header) -> Findings:
    """The weights of a network, or of a whole model in one file."""
    names, base = header.shapes, base_model(header.shapes)
    whole = any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in names)
    known = whole or any(name.startswith(NETWORK_KEYS) for name in names)
    stored = f"{len(names):,}, {header.parameters:,} parameters, {', '.join(sorted(header.dtypes))}"
    shown = [("tensors", stored), ("fits", base)]
    if not known:
        return Findings("tensors of an unknown kind", tuple(shown), ("Their names fit no known diffusion model.",))
    shown.append(("guidance", "an input of the network" if takes_guidance(names) else "classifier-free above 1"))
    guess = from_name(recognise(spoken(header)))
    doubts = [guess.because] if guess else ["Nothing says for which steps and guidance it was made; ask its maker."]
    kind = "whole model in one file" if whole else "weights of a denoising network alone"
    code = network_code(header.file, base, guess.call if guess else None, whole=whole)
    return Findings(kind, tuple(shown), tuple(doubts), code)


def _guidance_adapter(header: Header) -> Findings:
    try:
        told = dict(json.loads(header.metadata[HEADER]))
    except (ValueError, TypeError) as error:
        raise UserError(f"{header.file}: the header of this guidance adapter cannot be read ({error})") from error
    shown = (("made for", str(told.get("network"))), ("guidance", f"{told.get('guidance')}, unless told otherwise"),
             ("parameters", f"{header.parameters:,}"))  # fmt: skip
    code = (
        "import stepdistill\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("BASE")\n'
        f"adapter = stepdistill.load_adapter(pipe, {str(header.file)!r})\n"
        'image = pipe("a prompt", guidance_scale=1).images[0]'
    )
    return Findings("guidance adapter: guidance without its second network call", shown, (), code)


# ---- what is written beside them ---------------------------------------------------------------------------------


def spoken(header: Header) -> str:
    """Everything about a file in which its model's name may stand."""
    told = [header.metadata.get(key, "") for key in ("ss_output_name", "modelspec.title", "modelspec.description")]
    name = header.file.stem if header.file.name not in LORA_NAMES else header.file.resolve().parent.name
    return " ".join([name, *told])


def _facts_of(folder: Path) -> dict[str, Any]:
    file = folder / FACTS_FILE
    return _json(file) if file.is_file() else {}


def _told(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What the maker wrote down."""
    return tuple((key.replace("_", " "), str(facts[key])) for key in TOLD if facts.get(key) is not None)


def _kind_of(folder: Path) -> str:
    return str(_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", ""))


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content


def explain(paths: Sequence[Path]) -> str:
    """The findings of several paths, one below the other."""
    return "\n\n".join(f"{path}: {inspect_path(path).to_text()}" for path in paths)
