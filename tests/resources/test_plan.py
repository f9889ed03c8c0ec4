"""What `stepdistill plan` says of tiny teachers is what training them really holds, and no weights are read for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.processes.sharding import gathered_bytes
from stepdistill.recipe import Recipe
from stepdistill.resources.meter import BLOCK_BYTES, MemoryMeter, ShapesOnly, fake_mode, without_values
from stepdistill.resources.plan import StagePlan, plan
from tests.tiny import tiny_recipe, trainer_of


LORA = {"lora": {"rank": 2}}


def recipe_of(folder: str, tmp_path: Path, objective: dict[str, Any], **changes: Any) -> Recipe:
    """One stage of an objective, a micro-batch of two samples."""
    players = changes.pop("players", {"default": {"optimizer": {"lr": 1e-3}}})
    stage = {"objective": objective, "steps": 2, "batch_size": 2, "players": players, **changes.pop("stage", {})}
    return Recipe.from_mapping(tiny_recipe(folder, tmp_path / "run", stages=[stage], **changes))


def in_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def planned(folder: str, tmp_path: Path, objective: dict[str, Any], **changes: Any) -> StagePlan:
    return plan(recipe_of(folder, tmp_path, objective, **changes)).stages[0]


def measured(folder: str, recipe: Recipe) -> int:
    """The peak of an iteration that is really computed, by the same count of storages; optimisers step as on a GPU."""
    from stepdistill.objectives import resolve
    from stepdistill.stages import lora_settings

    stage = recipe.stages[0]
    family, meter = load_family(folder), MemoryMeter()
    objective = resolve(stage.objective.name)(**stage.objective.options)
    for component in family.pipeline.components.values():
        if isinstance(component, nn.Module):
            meter.hold(component)
    with meter:
        trainer = trainer_of(
            family, objective, lora=lora_settings(stage, objective, family), checkpointing=stage.checkpointing,
            player={"options": {"lr": 1e-3, "foreach": True}, "clip": stage.player("student").clip},
        )  # fmt: skip
        trainer.run()
        meter.start_anew()
        trainer._iterate()
    return meter.peak


class TestMeter:
    def test_a_storage_counts_once_however_many_views_it_has(self) -> None:
        with MemoryMeter() as meter:
            x = torch.zeros(1024)
            y = x.view(32, 32)[1:]
            x.add_(1)
        assert meter.now == 4096
        del x
        assert meter.now == 4096, "a view keeps its storage alive"
        del y
        assert meter.now == 0
        assert meter.peak == 4096

    def test_small_tensors_take_a_whole_block(self) -> None:
        with MemoryMeter() as meter:
            x = torch.zeros(1)
        assert meter.now == BLOCK_BYTES
        del x

    def test_what_other_processes_keep_is_not_counted_and_is_forgotten_only_once(self) -> None:
        with MemoryMeter() as meter:
            x, y = torch.zeros(4096), torch.zeros(4096)
            meter.divide([x], 4)
            assert meter.now == 4 * 4096 // 4 + 4 * 4096
            del x
            assert meter.now == 4 * 4096
        del y

    def test_what_backward_saves_is_counted_until_it_is_freed(self) -> None:
        layer = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Sigmoid(), nn.Linear(64, 64, bias=False))
        meter = MemoryMeter()
        meter.hold(layer)
        weights = meter.now
        with meter:
            x = torch.zeros(128, 64)
            y = layer(x).sum()
            held = meter.now
            y.backward()
        size = 128 * 64 * 4
        assert held >= weights + 2 * size, "the sigmoid's output is needed for its derivative"
        gradients = 2 * 64 * 64 * 4
        assert meter.now <= weights + size + gradients + 3 * BLOCK_BYTES

    def test_norms_are_wide_under_autocast_as_on_an_accelerator(self) -> None:
        norm, x = nn.GroupNorm(2, 4), torch.zeros(1, 4, 8, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert norm.to(torch.bfloat16)(x).dtype == torch.bfloat16
            with ShapesOnly():
                assert norm(x).dtype == torch.float32

    @pytest.mark.parametrize(
        ("norm", "shape"), [(nn.GroupNorm(2, 4), (2, 4, 3, 3)), (nn.LayerNorm((3, 2)), (2, 4, 3, 2))]
    )
    def test_norms_have_tangents_without_values(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        x, tangent = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

        def moved() -> torch.Tensor:
            with forward_ad.dual_level():
                output = norm(forward_ad.make_dual(x, tangent))
                return forward_ad.unpack_dual(nn.functional.silu(output)).tangent

        expected = moved()
        with ShapesOnly():  # with values, to see that they are the same
            found = moved()
        torch.testing.assert_close(found, expected)
        with without_values(fake_mode(), MemoryMeter()):
            x, tangent = torch.rand(shape), torch.rand(shape)
            assert moved().shape == shape

    def test_code_that_reads_values_runs_without_any(self) -> None:
        with without_values(fake_mode(), MemoryMeter()):
            x = torch.rand(3)
            assert float(x.sum()) == 1.0
            assert x.tolist() == [1.0, 1.0, 1.0]
            assert not (x > 2).any()


class TestPlan:
    @pytest.mark.slow
    @pytest.mark.parametrize("weights", ["full", LORA], ids=["full", "lora"])
    @pytest.mark.parametrize("objective", [{"name": "dmd2", "guidance": 2.0, "critic_updates": 1}, {"name": "vsd"}])
    def test_it_is_what_training_holds(
        self, sd_folder: str, tmp_path: Path, objective: dict[str, Any], weights: Any
    ) -> None:
        players = {"default": {"weights": weights, "optimizer": {"lr": 1e-3}}}
        recipe = recipe_of(sd_folder, tmp_path, objective, players=players)
        assert plan(recipe).peak_bytes == pytest.approx(measured(sd_folder, recipe), rel=0.05)

    @pytest.mark.slow
    def test_it_is_what_training_holds_with_checkpointing(self, sd_folder: str, tmp_path: Path) -> None:
        stage = {"checkpointing": True, "batch_size": 2}
        players = {"default": {"weights": LORA, "optimizer": {"lr": 1e-3}}}
        recipe = recipe_of(sd_folder, tmp_path, {"name": "dmd2"}, players=players, stage=stage)
        with_it = plan(recipe).peak_bytes
        assert with_it == pytest.approx(measured(sd_folder, recipe), rel=0.05)
        without = recipe_of(sd_folder, tmp_path, {"name": "dmd2"}, players=players)
        assert with_it < plan(without).peak_bytes

    @pytest.mark.slow
    @pytest.mark.parametrize("teacher", ["sd_folder", "dit_folder", "sd3_folder"])
    def test_every_family_can_be_planned(self, teacher: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        stage = planned(request.getfixturevalue(teacher), tmp_path, {"name": "dmd2", "gan_weight": 1e-3})
        family = load_family(request.getfixturevalue(teacher))
        count = sum(p.numel() for p in family.network().parameters())
        assert {role.role: role.parameters for role in stage.roles}["student"] == count

    @pytest.mark.parametrize(
        "name", ["sid", "lcm", "scm", "tcd", "lightning", "ladd", "f_distill", "denoising", "agd"]
    )
    @pytest.mark.slow
    def test_objectives_of_every_kind_can_be_planned(self, sd_folder: str, tmp_path: Path, name: str) -> None:
        options: dict[str, dict[str, Any]] = {"lcm": {"embed_guidance": False}}
        stage = planned(sd_folder, tmp_path, {"name": name, **options.get(name, {})})
        assert stage.phases
        assert stage.peak_bytes > stage.weights_bytes
        assert all(any(p.graph for p in phase.passes) for phase in stage.phases)

    @pytest.mark.slow
    def test_passes_are_those_of_the_algorithm(self, sd_folder: str, tmp_path: Path) -> None:
        stage = planned(
            sd_folder, tmp_path, {"name": "dmd2", "guidance": 2.0, "critic_updates": 3}, stage={"accumulate": 4}
        )
        critic, student = stage.phases
        found = {(p.role, p.graph): (p.calls, p.rows) for p in critic.passes}
        assert found == {("student", False): (12, 24), ("critic", True): (12, 24)}
        found = {(p.role, p.graph): (p.calls, p.rows) for p in student.passes}
        assert found[("teacher", False)] == (4, 16), "guidance makes two samples of one"
        assert found[("student", True)] == (4, 8)

    def test_no_file_of_weights_is_needed(self, sd_folder: str, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        for file in Path(sd_folder).rglob("*"):
            if file.is_file() and file.suffix != ".safetensors":
                copy = bare / file.relative_to(sd_folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
        with_weights = planned(sd_folder, tmp_path, {"name": "vsd"})
        assert planned(str(bare), tmp_path, {"name": "vsd"}) == with_weights

    @pytest.mark.slow
    def test_a_half_precision_base_halves_the_weights(self, sd_folder: str, tmp_path: Path) -> None:
        players = {"default": {"weights": LORA}}
        wide = planned(sd_folder, tmp_path, {"name": "vsd"}, players=players)
        half = planned(
            sd_folder, tmp_path, {"name": "vsd"}, players=players, memory={"base": "bf16"}, precision="bf16"
        )
        family = load_family(sd_folder)
        vae = sum(p.numel() * 4 for p in family.pipeline.vae.parameters())
        adapters = sum(4 * role.trained for role in wide.roles)
        kept = vae + adapters  # these stay float32
        assert half.weights_bytes - kept == pytest.approx((wide.weights_bytes - kept) / 2, rel=0.15)
        assert half.optimizer_bytes == wide.optimizer_bytes, "adapters are float32 on any base"

    @pytest.mark.slow
    def test_offloaded_states_and_parked_encoders_leave_the_device(self, sd_folder: str, tmp_path: Path) -> None:
        usual = planned(sd_folder, tmp_path, {"name": "vsd"})
        spared = planned(
            sd_folder, tmp_path, {"name": "vsd"}, memory={"offload_optimizer": True, "park_encoders": True}
        )
        assert usual.optimizer_bytes > 0
        assert spared.optimizer_bytes == 0
        assert spared.weights_bytes < usual.weights_bytes
        assert spared.peak_bytes < usual.peak_bytes

    @pytest.mark.slow
    def test_accumulation_meets_gradients_of_the_micro_batch_before(self, sd_folder: str, tmp_path: Path) -> None:
        once = planned(sd_folder, tmp_path, {"name": "vsd"}, stage={"batch_size": 16})
        twice = planned(sd_folder, tmp_path, {"name": "vsd"}, stage={"batch_size": 16, "accumulate": 3})
        assert twice.peak_bytes > once.peak_bytes

    def test_one_of_several_processes_plays_its_share_and_averages_its_gradients(
        self, sd_folder: str, tmp_path: Path
    ) -> None:
        objective = {"name": "dmd2", "guidance": 2.0, "critic_updates": 1}
        recipe = recipe_of(sd_folder, tmp_path, objective, stage={"batch_size": 4})
        one = recipe_of(sd_folder, tmp_path, objective, stage={"batch_size": 2})
        (shared,), (alone,) = plan(recipe, num_processes=2).stages, plan(one).stages
        assert [phase.passes for phase in shared.phases] == [phase.passes for phase in alone.phases]
        assert shared.weights_bytes == alone.weights_bytes
        assert shared.optimizer_bytes == alone.optimizer_bytes
        assert alone.peak_bytes <= shared.peak_bytes <= alone.peak_bytes + 2.1 * alone.gradient_bytes

    @pytest.mark.slow
    def test_divided_networks_count_a_part_and_what_is_gathered_of_the_others(
        self, sd_folder: str, tmp_path: Path
    ) -> None:
        players = {"default": {"optimizer": {"lr": 1e-3}, "ema": 0.9}}
        recipe = recipe_of(sd_folder, tmp_path, {"name": "denoising"}, players=players, stage={"batch_size": 4})
        (whole,), (part,) = (plan(recipe, num_processes=4, shard=shard).stages for shard in (False, True))
        network = load_family(sd_folder).network()
        sizes = [p.numel() * p.element_size() for p in network.parameters()]
        saved = sum(in_blocks(size) - in_blocks(-(-size // 4)) for size in sizes)
        assert saved > sum(sizes) / 2, "although tiny requests take whole blocks"
        assert whole.weights_bytes - part.weights_bytes == saved
        assert whole.average_bytes - part.average_bytes == saved
        assert whole.optimizer_bytes - part.optimizer_bytes == 2 * saved
        assert whole.gradient_bytes / part.gradient_bytes == pytest.approx(4, rel=0.01)
        gathered = gathered_bytes(network)
        assert max(sizes) < gathered < 2 * sum(sizes)
        kept = part.weights_bytes + part.average_bytes + part.optimizer_bytes
        assert kept + gathered < part.peak_bytes <= whole.peak_bytes - 4 * saved + gathered

    def test_processes_that_cannot_share_a_batch_are_refused(self, sd_folder: str, tmp_path: Path) -> None:
        recipe = recipe_of(sd_folder, tmp_path, {"name": "vsd"})
        with pytest.raises(UserError, match="cannot be divided among 3 processes"):
            plan(recipe, num_processes=3)
        half = recipe_of(sd_folder, tmp_path, {"name": "vsd"}, precision="fp16")
        with pytest.raises(UserError, match="fp16 scales its losses, which divided networks do not support"):
            plan(half, num_processes=2, shard=True)

    def test_a_single_file_is_refused_with_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"single file.*teacher_config=owner/name"):
            plan(recipe_of("model.safetensors", tmp_path, {"name": "vsd"}))


class TestCommand:
    @pytest.fixture
    def file(self, sd_folder: str, tmp_path: Path) -> Iterator[str]:
        import yaml

        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_of(sd_folder, tmp_path, {"name": "vsd"}).model_dump(mode="json")))
        yield str(path)

    def test_what_fits_ends_with_0_and_what_does_not_with_3(self, file: str, tmp_path: Path) -> None:
        output = tmp_path / "plan.json"
        result = CliRunner().invoke(app, ["plan", file, "--memory", "4", "--output", str(output)])
        assert result.exit_code == 0, result.output
        assert "fits into" in result.output
        assert "to download: nothing" in result.output
        found = json.loads(output.read_text())
        assert found["fits"] is True
        assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in found["stages"])
        result = CliRunner().invoke(app, ["plan", file, "--memory", "0.3", "--num-processes", "2"])
        assert result.exit_code == 3
        assert "in each of 2 processes; does not fit" in result.output

    def test_a_model_of_the_hub_is_named_with_the_reason_why_its_size_is_unknown(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import HfApi

        from stepdistill.resources.downloads import downloads

        def offline(self: HfApi, name: str, **options: Any) -> None:
            raise OSError("no network")

        monkeypatch.setattr(HfApi, "model_info", offline)
        content = {"name": "x", "teacher": "owner/name", "data": {"prompts": "shapes"},
                   "stages": [{"objective": {"name": "vsd"}, "steps": 1}]}  # fmt: skip
        found = downloads(Recipe.from_mapping(content))
        assert [(d.name, d.missing_bytes) for d in found] == [("owner/name", None)]
        assert "no network" in found[0].note
