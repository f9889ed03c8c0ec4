"""Several students as one model: a stock pipeline whose network is, row by row, that of the prompt's own student.

    from stepdistill import load_students
    pipe = load_students("runs/NAME")
    images = pipe(["a red circle", "a blue ring"], num_inference_steps=1, guidance_scale=1).images

On disk it is a folder with students.json, the partition's files, and the students, each of which is a stock Diffusers
folder that works alone.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.assets import resolve_model_path
from stepdistill.errors import UserError, first_line
from stepdistill.labels import class_label
from stepdistill.partition import Embedder, Partition, Router, load_partition
from stepdistill.stock_files import loading_errors, reason, stock_pipeline


NOTICEABLE = 0.005  # share of a student's change; less than that is rounding, to the percent that is told
STUDENTS_FILE = "students.json"
FORMAT = 1
NETWORKS = ("unet", "transformer")
WITHOUT_ROWS = ("img_ids", "txt_ids")  # places of FLUX's tokens, of which all images of a batch have the same


class RoutedNetwork(nn.Module):
    """Stands where a pipeline has its network, and calls for every row of the batch the network of its student.

    Args:
        networks: the students' networks, or the one that they are adapters of.
        select: the number of a student => the network that computes as this student from now on.
    """

    def __init__(self, networks: Sequence[nn.Module], select: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.rows: tuple[int, ...] = ()
        self._select = select or (lambda number: self.networks[number])

    def __getattr__(self, name: str) -> Any:
        """What pipelines ask a network for beside its call, such as SDXL's `add_embedding`: the first student's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "networks":  # the last: asked for before it is there
                raise
            return getattr(self.networks[0], name)

    @property
    def config(self) -> Any:
        """The Diffusers configuration, which the students share."""
        first: Any = self.networks[0]
        return first.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.networks[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.networks[0].parameters()).device

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """As the students' own; tensors with a row per sample are divided, everything else goes to all."""
        count = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim))
        if not self.rows or count % len(self.rows):
            raise UserError(f"a batch of {count} rows does not belong to {len(self.rows)} routed prompts; call the "
                            "routed pipeline, not the stock one inside of it")  # fmt: skip
        # Guidance stacks the batch on itself: its unconditional rows go where their prompts go.
        students = torch.tensor(self.rows * (count // len(self.rows)))
        output: Tensor | None = None
        for number in sorted(set(self.rows)):
            mine = (students == number).nonzero().flatten()
            own, named = [_rows(value, mine, count) for value in args], _rows(kwargs, mine, count)
            part = self._select(number)(*own, **named, return_dict=False)[0]
            output = part.new_zeros((count, *part.shape[1:])) if output is None else output
            output[mine.to(part.device)] = part
        assert output is not None, "there is at least one row"
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _rows(value: Any, mine: Tensor, count: int) -> Any:
    """The student's rows of what has a row per sample, by itself or under a name; everything else as it is."""
    if isinstance(value, Mapping):  # a call's arguments, and among them those that SDXL and PixArt add
        return {name: part if name in WITHOUT_ROWS else _rows(part, mine, count) for name, part in value.items()}
    return value[mine.to(value.device)] if isinstance(value, Tensor) and value.ndim and len(value) == count else value


class RoutedPipeline:
    """A stock pipeline and the partition that says which student draws which prompt.

    Args:
        stock: the pipeline, with a `RoutedNetwork` as its network.
        router: prompts => students.

    Attributes:
        stock: the same.
    """

    def __init__(self, stock: Any, router: Router) -> None:
        self.stock, self._router = stock, router
        (self._network,) = (part for part in stock.components.values() if isinstance(part, RoutedNetwork))

    @property
    def components(self) -> dict[str, Any]:
        """The stock pipeline's parts, with the students' networks as `unet_0`, `unet_1` and so on."""
        parts: dict[str, Any] = dict(self.stock.components)
        name = next(name for name, part in parts.items() if part is self._network)
        del parts[name]
        return {**parts, **{f"{name}_{number}": part for number, part in enumerate(self._network.networks)}}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.stock.device
        return device

    @property
    def scheduler(self) -> Any:
        """The schedule that the students share."""
        return self.stock.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.stock.scheduler = scheduler

    def register_modules(self, **modules: Any) -> None:
        """Takes other parts, of a copy of the stock pipeline: a copy of this one may share it."""
        self.stock = copy.copy(self.stock)
        self.stock.register_modules(**modules)

    def set_progress_bar_config(self, **options: Any) -> None:
        """As the stock pipeline's."""
        self.stock.set_progress_bar_config(**options)

    def to(self, *args: Any, **kwargs: Any) -> RoutedPipeline:
        """Moves all parts."""
        self.stock.to(*args, **kwargs)
        return self

    def parts(self, prompts: Sequence[str]) -> list[int]:
        """The number of each prompt's student."""
        return self._router(prompts)

    def __call__(
        self, prompt: str | Sequence[str], *, num_images_per_prompt: int = 1, eta: float | None = None, **options: Any
    ) -> Any:
        """Draws every prompt with its own student, in the order of the prompts.

        Args:
            prompt: one or several texts; of a class-conditional model, numbers or names of classes.
            num_images_per_prompt: as in the stock pipeline.
            eta: share of fresh noise between steps, for students with a TCDScheduler.
            **options: of the stock pipeline's call.

        Returns:
            What the stock pipeline returns.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._network.rows = tuple(n for n in self.parts(prompts) for _ in range(num_images_per_prompt))
        try:
            if "class_labels" in self._accepted:
                labels = [class_label(self.stock, text) for text in prompts for _ in range(num_images_per_prompt)]
                return self.stock(class_labels=labels, **options)
            extra = {} if eta is None or "eta" not in self._accepted else {"eta": eta}
            return self.stock(prompt=prompts, num_images_per_prompt=num_images_per_prompt, **extra, **options)
        finally:
            self._network.rows = ()

    @property
    def _accepted(self) -> Mapping[str, Any]:
        return inspect.signature(self.stock.__call__).parameters


def is_routed(folder: str | Path) -> bool:
    """Whether a folder holds several students."""
    return (Path(folder) / STUDENTS_FILE).is_file()


def write_students(folder: Path, students: Sequence[str]) -> None:
    """Writes students.json: where the students are, below the folder; `students` in the partition's order."""
    content = {"format": FORMAT, "students": list(students)}
    (folder / STUDENTS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_students(
    folder: str | Path,
    *,
    rule: str | None = None,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> RoutedPipeline:
    """Loads the finished students of a run as one pipeline, safetensors only; they share all parts but the network.

    Args:
        folder: the run's.
        rule: the function that divides the prompts, "package.module:function", if they are divided by one.
        base: the pipeline that the students are LoRAs on: one network and K adapters instead of K networks. Warns if
            they were trained with all their weights, of which the LoRAs beside them keep a part.
        dtype: of all weights; prompts are divided in float32 in any case.
        device: torch device.

    Raises:
        UserError: the folder holds no students, one of them cannot be loaded, or the rule was not given.
    """
    folder = Path(folder)
    places = student_folders(folder)
    partition: Partition = load_partition(folder, rule)
    if partition.students != len(places):
        raise UserError(f"{folder}: {len(places)} students, but its prompts are divided among {partition.students}; "
                        "the folder is not complete")  # fmt: skip
    home = places[0] if base is None else resolve_model_path(base)
    stock = _with_networks(places, dtype) if base is None else _with_adapters(places, str(home), dtype)
    embedder = Embedder(stock.to(device), home)
    return RoutedPipeline(stock, Router(partition, embedder))


def student_folders(folder: Path) -> list[Path]:
    """The pipelines of the students in a folder, in the partition's order.

    Raises:
        UserError: there are none, or they do not lie in it.
    """
    file = folder / STUDENTS_FILE
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["students"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); train the students to their end first") from error
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{file}: {name!r} does not lie in this folder")
    return [folder / name for name in names]


def _with_networks(places: Sequence[Path], dtype: torch.dtype) -> Any:
    """The first student's pipeline with the networks of all."""
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: this student is missing; the folder is not complete")
    first = _loaded(str(places[0]), dtype)
    name = _network_name(first)
    kind = type(first.components[name])
    networks = [first.components[name]]
    for place in places[1:]:
        try:
            networks.append(kind.from_pretrained(place, subfolder=name, dtype=dtype, use_safetensors=True))
        except loading_errors() as error:
            raise UserError(f"{place}: the student cannot be loaded ({reason(str(place), error)})") from error
    first.register_modules(**{name: RoutedNetwork([network.eval() for network in networks])})
    return first


def _with_adapters(places: Sequence[Path], base: str, dtype: torch.dtype) -> Any:
    """The base with every student's LoRA as an adapter of its own, and with the students' scheduler."""
    import diffusers

    stock = _loaded(base, dtype)
    folders = [place.parent / "lora" for place in places]
    scheduler = folders[0] / "scheduler"
    names = [f"student-{number}" for number in range(len(places))]
    _tell_losses(folders)
    try:
        for name, lora in zip(names, folders, strict=True):
            stock.load_lora_weights(lora, adapter_name=name, use_safetensors=True)
        kind = json.loads((scheduler / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    except AttributeError as error:
        raise UserError(f"{type(stock).__name__} cannot load LoRAs in Diffusers; leave base away") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{places[0].parent.parent}: the students' LoRAs cannot be loaded on {base} "
                        f"({first_line(error)}); leave base away") from error  # fmt: skip
    network: nn.Module = stock.components[_network_name(stock)]
    adapters: Any = network

    def select(number: int) -> nn.Module:
        adapters.set_adapters(names[number])
        return network

    stock.register_modules(**{
        "scheduler": getattr(diffusers, kind).from_pretrained(scheduler),
        _network_name(stock): RoutedNetwork([network], select),
    })  # fmt: skip
    return stock


def _tell_losses(loras: Sequence[Path]) -> None:
    """Warns of LoRAs that were made of students with full weights, and lost much of what these had learnt."""
    from stepdistill.export.pipeline import FACTS_FILE

    lost = {}
    for lora in loras:
        try:
            facts = json.loads((lora / FACTS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # without facts nothing is known; a LoRA that is missing is told of by whoever loads it
        if facts.get("residual", 0.0) > NOTICEABLE:
            lost[lora.parent.name] = facts["residual"]
    if lost:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in lost.items())
        warnings.warn(f"base: these students were trained with all their weights, of whose change their LoRAs lost a "
                      f"part ({shares}), so that they draw other images; leave base away for the students as trained, "
                      "or train them with weights: {lora: ...}", stacklevel=4)  # fmt: skip


def _loaded(path: str, dtype: torch.dtype) -> Any:
    try:
        return stock_pipeline(path, dtype=dtype)
    except loading_errors() as error:
        raise UserError(f"{path}: cannot be loaded as a Diffusers pipeline ({reason(path, error)})") from error


def _network_name(pipeline: Any) -> str:
    found = [name for name in NETWORKS if isinstance(pipeline.components.get(name), nn.Module)]
    if not found:
        raise UserError(f"{type(pipeline).__name__} has neither unet nor transformer, so it cannot be routed")
    return found[0]
