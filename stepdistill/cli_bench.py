"""The command `stepdistill bench`, and what is made once before it: `stepdistill bench prepare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from stepdistill.cli_models import HeightOption, WidthOption, parse_models, recipe_hash
from stepdistill.errors import UserError
from stepdistill.terminal import device_of, hide_loading_bars, open_console


if TYPE_CHECKING:
    from rich.console import Console

    from stepdistill.bench.metrics.weights import Weights
    from stepdistill.bench.prompts import ShapesProtocol
    from stepdistill.bench.protocols import PromptProtocol
    from stepdistill.bench.study import Progress

MEASURE = "measure"
PREPARED = Path("protocols")
FILE_PREFIX = "prompts:"


class MeasuringGroup(TyperGroup):
    """Takes words that are no command of its own as those of `measure`, which so needs no name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = args if args and args[0] in self.commands else [MEASURE, *args]
        return super().parse_args(ctx, words)


bench_app = typer.Typer(
    name="bench",
    cls=MeasuringGroup,
    help="Measure exported models: quality against network calls.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="Where the weights of a metric lie: inception, dinov2, clip, clip-l14, vgg16, hpsv2, pickscore, "
        "aesthetic, image_reward. Also STEPDISTILL_WEIGHTS_INCEPTION=PATH and so on.",
    ),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]


@bench_app.command(name=MEASURE)
def measure(  # noqa: PLR0913  # an argument is an option of the command
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL[+FILE][,KEY=VALUE]",
            help="Folders, hub ids, single files or folders of images; +FILE puts a LoRA or adapter on one. Behind "
            "commas what differs from how the model wants to be called: name, steps, nfe, guidance_scale, lora, "
            "scheduler, precision, height, width. Example: runs/quickstart teacher=assets/shapes/teacher,nfe=[4,8]. "
            "`stepdistill bench prepare --help` is about protocols with real images.",
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME=MODEL", help="The same, as an option.")] = None,
    nfe: Annotated[
        str | None, typer.Option(help="Network calls per image, such as 1,2,4,8, of models that leave them open.")
    ] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    protocol: Annotated[str, typer.Option(help="shapes, coco30k, coco10k-sdxl, mjhq30k, or prompts:FILE.")] = "shapes",
    prepared: Annotated[Path, typer.Option(help="Folder of prepared protocols.")] = PREPARED,
    metrics: Annotated[
        str | None, typer.Option(help="Names, such as usual,vendi,lpips, or package.module:function.")
    ] = None,
    weights: WeightsOption = None,
    offline: OfflineOption = False,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of the protocol. Default: 64 of shapes, else all.")
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Diversity needs at least 2. Default: 8 of shapes, else 1.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the noise. Default: the protocol's, else 0.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call; does not change them.")] = 64,
    exact: Annotated[
        bool, typer.Option("--exact", help="Round alike at every batch size and number of processes; slower.")
    ] = False,
    save_images: Annotated[bool, typer.Option("--save-images", help="Also write every image.")] = False,
    evaluator: Annotated[str, typer.Option(help="CLIPModel that measures shapes.")] = "assets/shapes/clip",
    output: Annotated[Path, typer.Option(help="Folder for the report; a stopped one goes on.")] = Path("report"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Measure exported models: quality against network calls."""
    _go_offline(offline)
    calls = _calls(nfe)
    size = {"height": height, "width": width}
    tested = [cell for text in [*(models or []), *(model or [])] for cell in parse_models(text, calls, size)]
    from stepdistill.bench.benchmark import Options, Provenance, run_benchmark
    from stepdistill.bench.cells import Share

    hide_loading_bars()
    chosen = _protocol(protocol, prepared, prompts, images_per_prompt, evaluator)
    names = None if metrics is None else tuple(name.strip() for name in metrics.split(","))
    share = Share.launched()
    options = Options(names, _weights(weights, offline), exact, save_images, share)
    console = open_console(quiet=share.index > 0)
    with _progress(console) as tell:
        report = run_benchmark(
            tested, protocol=chosen, output=output, device=_own_device(device_of(device)), batch_size=batch_size,
            seed=_seed(protocol) if seed is None else seed, on_progress=tell, options=options,
            provenance=Provenance(recipe_sha256=recipe_hash(tested)),
        )  # fmt: skip
    if share.index == 0:
        console.print(report.to_table())
        typer.echo(str(output / "report.md"))


@bench_app.command()
def prepare(
    protocol: Annotated[str, typer.Argument(metavar="PROTOCOL", help="coco30k, coco10k-sdxl, or mjhq30k.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder with your copy of its real images, for the statistics.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with its prompts; may be added to finished statistics.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: protocols/PROTOCOL.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Function that gives features instead of Inception: package.module:name.")
    ] = None,
    weights: WeightsOption = None,
    offline: OfflineOption = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Make a protocol's statistics from your own copy of its images."""
    _go_offline(offline)
    if images is None and prompts is None:
        raise UserError("bench prepare: give --images DIR, the folder with the real images, or --prompts FILE to add "
                        "the prompts to finished statistics")  # fmt: skip
    from stepdistill.bench import protocols
    from stepdistill.bench.study import Progress

    folder = output or PREPARED / protocol
    with _progress(open_console()) as tell:
        missing = protocols.prepare(
            protocol, images, prompts, folder, weights=_weights(weights, offline), features=features,
            device=device_of(device), on_progress=lambda done, total: tell(Progress("real images", done, total)),
        )  # fmt: skip
    for network, reason in missing.items():
        typer.echo(f"left out: {network}: {reason}")
    if not (folder / protocols.PROMPTS).is_file():
        typer.echo(f"without prompts; before measuring: stepdistill bench prepare {protocol} --prompts FILE "
                   f"--output {folder}")  # fmt: skip
    typer.echo(str(folder))


def _go_offline(wanted: bool) -> None:
    """Tells the libraries, which read this when they are first imported."""
    if wanted:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def _own_device(device: str) -> str:
    """Of several processes on one machine each has an accelerator of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _calls(text: str | None) -> Sequence[int]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--nfe {text}: numbers of network calls are wanted, such as 1,2,4,8")
    return [int(word) for word in words]


def _weights(pairs: Sequence[str] | None, offline: bool) -> Weights:
    from stepdistill.bench.metrics.weights import Weights
    from stepdistill.recipe_text import key_and_value

    expected = "name=path, for example inception=inception-2015-12-05.pt"
    return Weights(dict(key_and_value(pair, f"--weights {pair}:", expected) for pair in pairs or []), offline)


def _protocol(
    kind: str, prepared: Path, prompts: int | None, images_per_prompt: int | None, evaluator: str
) -> ShapesProtocol | PromptProtocol:
    from stepdistill.bench.prompts import ShapesProtocol
    from stepdistill.bench.protocols import STANDARDS, PromptProtocol

    if kind == "shapes":
        return ShapesProtocol(prompts or 64, images_per_prompt or 8, evaluator=evaluator)
    options: dict[str, Any] = {"count": prompts, "images_per_prompt": images_per_prompt or 1}
    if kind.startswith(FILE_PREFIX):
        return PromptProtocol.of_file(kind.removeprefix(FILE_PREFIX), **options)
    if kind not in STANDARDS:
        raise UserError(f"--protocol {kind}: is none of shapes, {', '.join(STANDARDS)}, or {FILE_PREFIX}FILE")
    folder = prepared if (prepared / "protocol.json").is_file() else prepared / kind
    return PromptProtocol.standard(kind, folder, **options)


def _seed(kind: str) -> int:
    from stepdistill.bench.protocols import STANDARDS

    return STANDARDS[kind].seed if kind in STANDARDS else 0


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar for every part of a benchmark, and the function that moves them."""
    from rich import progress as bars

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
               bars.TimeRemainingColumn())  # fmt: skip
    tasks: dict[str, bars.TaskID] = {}
    with bars.Progress(*columns, console=console) as shown:

        def tell(news: Progress) -> None:
            if news.label not in tasks:
                tasks[news.label] = shown.add_task(news.label, total=news.total)
            shown.update(tasks[news.label], completed=news.done)

        yield tell
