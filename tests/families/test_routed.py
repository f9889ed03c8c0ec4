"""Several students behind one stock pipeline: every prompt gets what its own student draws."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill import load_students
from stepdistill.adapters import LoraSettings, SharedNetwork
from stepdistill.attention import NASA
from stepdistill.bench.generate import ModelUnderTest, Painter, generate_images, load_pipeline
from stepdistill.cast import RoleState
from stepdistill.cli_models import parse_models
from stepdistill.draw import Avoid, draw
from stepdistill.errors import UserError
from stepdistill.export.lora import difference_lora, export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families import load_family
from stepdistill.finish import merged_network
from stepdistill.objectives.base import InferenceSpec
from stepdistill.partition import ByClass, ByRule, save_partition
from stepdistill.routed import RoutedNetwork, is_routed, write_students
from tests.tiny import LORA, scramble


RULE = "tests.families.test_routed:first_half"
ONE = InferenceSpec((999,))
PROMPTS = ["z", "a", "b", "y"]  # students 1, 0, 0, 1
LABELS = ["999", "3", "ring", "500"]  # the same of a table of halves


def first_half(prompt: str) -> int:
    return int(prompt[0] > "m")


def save_students(teacher: str, folder: Path) -> Path:
    """Two students, LoRAs on a teacher where it can load them, and what makes one model of them."""
    for number in range(2):
        family, other = load_family(teacher), load_family(teacher)
        settings = LORA if family.name == "sd" else LoraSettings(2, 4.0, ("to_q", "to_v", "ff.net.2"))
        shared = SharedNetwork(other.network())
        shared.add("student", settings)
        scramble(shared.parameters("student"), seed=number + 1)
        tensors = {name: p.detach().clone() for name, p in shared.parameters("student").items()}
        network = merged_network(family, RoleState(settings, tensors))
        place = folder / f"student-{number}"
        export_pipeline(family, network, ONE, place / "pipeline", facts={})
        if family.supports_lora_loading:
            export_lora(family, tensors, rank=2, alpha=4.0, folder=place / "lora", spec=ONE)
    kind = ByClass.consecutive(1000, 2) if family.name == "dit" else ByRule.named(RULE, 2)
    save_partition(kind, folder)
    write_students(folder, ["student-0/pipeline", "student-1/pipeline"])
    return folder


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: str, sd3_folder: str, dit_folder: str, sdxl_folder: str,
    flux_folder: str,
) -> dict[str, Path]:  # fmt: skip
    place = tmp_path_factory.mktemp("students")
    teachers = {"sd": sd_folder, "sd3": sd3_folder, "dit": dit_folder, "sdxl": sdxl_folder, "flux": flux_folder}
    return {name: save_students(teacher, place / name) for name, teacher in teachers.items()}


def drawn(pipe: Any, prompts: list[Any], seeds: list[int], **options: Any) -> Tensor:
    """Images (B, 3, H, W), each from noise of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "pt", **options}
    return pipe(prompts, generator=generators, **call).images


def alone(folder: Path, number: int) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder / f"student-{number}" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def together(folder: Path, **options: Any) -> Any:
    pipe = load_students(folder, **{"rule": RULE, **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["sd", "sd3", "dit", "sdxl", "flux"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_prompt_gets_what_its_own_student_draws_alone(
    name: str, guidance: float, folders: dict[str, Path]
) -> None:
    prompts = LABELS if name == "dit" else PROMPTS
    images = drawn(together(folders[name]), prompts, [0, 1, 2, 3], guidance_scale=guidance)
    for number, mine in ((0, [1, 2]), (1, [0, 3])):
        stock = alone(folders[name], number)
        given = [stock.labels.get(p) or int(p) for p in prompts] if name == "dit" else prompts
        expected = drawn(stock, [given[i] for i in mine], mine, guidance_scale=guidance)
        torch.testing.assert_close(images[mine], expected, rtol=0, atol=1e-5)
        other = drawn(alone(folders[name], 1 - number), [given[i] for i in mine], mine, guidance_scale=guidance)
        assert (other - expected).abs().max() > 1e-3, "the students do not differ, so nothing was shown"


def test_several_images_of_a_prompt_come_from_one_student(folders: dict[str, Path]) -> None:
    images = drawn(together(folders["sd"]), ["z", "a"], [0, 1, 2, 3], num_images_per_prompt=2)
    expected = drawn(alone(folders["sd"], 1), ["z"], [0, 1], num_images_per_prompt=2)
    torch.testing.assert_close(images[:2], expected, rtol=0, atol=1e-5)
    labels = drawn(together(folders["dit"]), ["999", "3"], [0, 1, 2, 3], num_images_per_prompt=2)
    expected = drawn(alone(folders["dit"], 1), [999, 999], [0, 1])
    torch.testing.assert_close(labels[:2], expected, rtol=0, atol=1e-5)


def test_one_prompt_may_be_a_plain_text(folders: dict[str, Path]) -> None:
    pipe = together(folders["sd"])
    assert torch.equal(drawn(pipe, "z", [4]), drawn(pipe, ["z"], [4]))
    assert pipe.parts(["z", "a"]) == [1, 0]


@pytest.mark.parametrize("name", ["sd", "sd3", "sdxl", "flux"])
def test_adapters_on_one_network_draw_the_same(name: str, folders: dict[str, Path], request) -> None:
    base = request.getfixturevalue(f"{name}_folder")
    adapters, networks = together(folders[name], base=base), together(folders[name])
    a, b = (drawn(pipe, PROMPTS, [0, 1, 2, 3]) for pipe in (adapters, networks))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert type(adapters.scheduler) is type(networks.scheduler)
    assert sum(isinstance(part, nn.Module) for part in adapters.components.values()) == (
        sum(isinstance(part, nn.Module) for part in networks.components.values()) - 1
    ), "one network with two adapters instead of two networks"


def test_loras_that_lost_a_part_of_fully_trained_students_are_told_of(
    folders: dict[str, Path], tmp_path: Path, sd_folder: str
) -> None:
    family = load_family(sd_folder)
    student = DiffusionPipeline.from_pretrained(folders["sd"] / "student-1" / "pipeline").unet
    found = difference_lora(family.network(), student, rank=1)
    shutil.copytree(folders["sd"], tmp_path / "run")
    export_lora(
        family, found.state, rank=1, alpha=1, folder=tmp_path / "run" / "student-1" / "lora", spec=ONE,
        facts={"residual": found.residual},
    )  # fmt: skip
    assert found.residual > 0.1
    lost = rf"all their weights, .* lost a part \(student-1 {found.residual:.0%}\).*leave base away"
    with pytest.warns(UserWarning, match=lost), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # peft's, of any two adapters
        together(tmp_path / "run", base=sd_folder)


@pytest.mark.parametrize(("name", "steps"), [("sd", [1]), ("flux", [1, 2])])
def test_guidance_costs_several_students_what_it_costs_one_of_them(
    name: str, steps: list[int], folders: dict[str, Path]
) -> None:
    cells = parse_models(f"all={folders[name]},guidance_scale=3,rule={RULE}", nfe=[1, 2])
    assert [cell.steps for cell in cells] == steps
    made = generate_images(load_pipeline(cells[-1]), PROMPTS, model=cells[-1], images_per_prompt=1, batch_size=3)
    assert made.nfe == 2


def test_the_students_share_everything_but_their_networks(folders: dict[str, Path]) -> None:
    pipe = together(folders["sd"])
    assert type(pipe.stock).__name__ == "StableDiffusionPipeline"
    assert {"unet_0", "unet_1", "vae", "text_encoder", "scheduler"} <= set(pipe.components)
    assert "unet" not in pipe.components


def test_the_benchmark_routes_and_counts_one_network_call_an_image(folders: dict[str, Path]) -> None:
    model = ModelUnderTest("students", str(folders["sd"]), 1, 1.0, rule=RULE)
    made = generate_images(load_pipeline(model), PROMPTS, model=model, images_per_prompt=2, batch_size=3)
    assert made.nfe == 1
    for number, mine in ((0, [1, 2]), (1, [0, 3])):
        own = ModelUnderTest("one", str(folders["sd"] / f"student-{number}" / "pipeline"), 1, 1.0)
        expected = generate_images(load_pipeline(own), PROMPTS, model=own, images_per_prompt=2, batch_size=3).images
        rows = [2 * i + k for i in mine for k in range(2)]
        torch.testing.assert_close(made.images[rows], expected[rows], rtol=0, atol=1e-5)


def test_an_image_has_the_same_bits_in_every_batch_where_the_benchmark_wants_it(folders: dict[str, Path]) -> None:
    model = ModelUnderTest("students", str(folders["sd"]), 1, 1.0, rule=RULE)
    painter = Painter(load_pipeline(model), model, PROMPTS, exact=True)
    jobs = [(prompt, 0) for prompt in range(4)]
    together = painter(jobs)
    assert torch.equal(together[2:], painter(jobs[2:]))
    assert torch.equal(together[:1], painter(jobs[:1]))


def test_what_goes_on_one_network_is_refused_for_several(folders: dict[str, Path], sd_folder: str) -> None:
    for option in ("lora", "adapter", "base"):
        model = ModelUnderTest("students", str(folders["sd"]), 1, 1.0, rule=RULE, **{option: sd_folder})
        with pytest.raises(UserError, match=f"several students, which have no use for {option}"):
            load_pipeline(model)
    with pytest.raises(UserError, match=f"stepdistill sample --rule {RULE}, rule={RULE} behind a model"):
        load_pipeline(ModelUnderTest("students", str(folders["sd"]), 1, 1.0))


def test_pictures_and_negative_prompts_go_through_the_students(folders: dict[str, Path], tmp_path: Path) -> None:
    model = ModelUnderTest("students", str(folders["sd"]), 1, 1.0, rule=RULE)
    plain = [file.read_bytes() for file in draw(model, PROMPTS, tmp_path / "plain")]
    steered = [file.read_bytes() for file in draw(model, PROMPTS, tmp_path / "nasa", avoid=Avoid("c", NASA(5.0)))]
    assert len(plain) == len(steered) == 4
    assert all(a != b for a, b in zip(plain, steered, strict=True))
    one = ModelUnderTest("one", str(folders["sd"] / "student-1" / "pipeline"), 1, 1.0)
    (first, *_) = draw(one, PROMPTS[:1], tmp_path / "one")
    assert first.read_bytes() == plain[0]
    traced = list(draw(model, PROMPTS[:1], tmp_path / "trace", trace=True))
    assert traced[-1].name.endswith("trace.png")


def test_a_network_that_nobody_routed_says_so() -> None:
    network = RoutedNetwork([nn.Identity()])
    with pytest.raises(UserError, match="a batch of 2 rows does not belong to 0 routed prompts"):
        network(torch.zeros(2, 1))


def test_unfinished_and_foreign_folders_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    assert is_routed(folders["sd"])
    assert not is_routed(tmp_path)
    with pytest.raises(UserError, match=r"students\.json: cannot be read"):
        load_students(tmp_path)
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in ("students.json", "partition.json"):
        shutil.copy(folders["sd"] / file, copied)
    with pytest.raises(UserError, match="this student is missing"):
        load_students(copied, rule=RULE)
    for names, reason in ((["../x", "y"], "does not lie in this folder"), (["x"], "the folder is not complete")):
        (copied / "students.json").write_text(json.dumps({"students": names}))
        with pytest.raises(UserError, match=reason):
            load_students(copied, rule=RULE)


def test_places_of_tokens_are_no_rows_and_added_conditions_are() -> None:
    class Student(nn.Module):
        def forward(self, hidden_states: Tensor, img_ids: Tensor, added: dict[str, Any], return_dict: bool) -> Any:
            return (hidden_states + added["sizes"] + img_ids.sum(),)

    network = RoutedNetwork([Student(), Student()])
    network.rows = (0, 1, 0, 0)
    x, ids, sizes = torch.zeros(4, 1), torch.ones(4, 3), torch.arange(4.0)[:, None]
    said = network(hidden_states=x, img_ids=ids, added={"sizes": sizes, "aspect": None}, return_dict=False)[0]
    assert torch.equal(said, sizes + 12), "four tokens in a batch of four images, and a size for each"
