"""Networks that lack a part of their teacher's: which parts they keep, from where, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from stepdistill.adapters import LoraSettings
from stepdistill.cast import Cast
from stepdistill.denoiser import OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.pixart import PixArt
from stepdistill.families.smaller import Plan, spread, transformer_plan, two_row_plan, unet_plan
from stepdistill.families.tiny_flux import tiny_flux
from stepdistill.families.tiny_pixart import tiny_pixart
from stepdistill.network_shape import NetworkShape
from stepdistill.objectives.base import Frozen, Recorded, Trained
from stepdistill.objectives.denoising import Denoising
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.small_students import cost_of, describe, shaped_roles
from tests.tiny import tiny_recipe


def big_unet() -> Any:
    """Three stages of two layers, two transformer layers in each attention."""
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), transformer_layers_per_block=2,
        cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


def long_dit(layers: int = 4) -> Any:
    torch.manual_seed(4)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=layers, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip


def made(teacher: Any, plan: Plan) -> tuple[Any, int]:
    """The smaller network, filled, and how many of its weights are the teacher's."""
    network = type(teacher).from_config(teacher.config, **plan.options).eval()
    return network, plan.fill(network, teacher.state_dict())


@torch.no_grad()
def said(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10.0, 800.0])
    if isinstance(network, DiTTransformer2DModel):
        return network(x, timestep=t, class_labels=torch.tensor([1, 2])).sample
    tokens = torch.randn(2, 5, network.config.cross_attention_dim, generator=generator)
    return network(x, t, encoder_hidden_states=tokens).sample


# ---- which parts ---------------------------------------------------------------------------------------------------


def test_kept_layers_are_evenly_spaced_and_the_first_and_last_are_among_them() -> None:
    assert [spread(*n) for n in ((3, 3), (3, 2), (3, 1), (12, 4))] == [(0, 1, 2), (0, 2), (0,), (0, 4, 7, 11)]
    for have in range(1, 30):
        for keep in range(1, have + 1):
            kept = spread(have, keep)
            assert len(set(kept)) == keep
            assert set(kept) <= set(range(have))


def test_a_unet_without_inner_stage_middle_and_second_layers_is_made_of_the_teachers_outer_parts() -> None:
    teacher = big_unet()
    plan = unet_plan(teacher.config, NetworkShape(layers=1, depth=1, remove=("mid_block", "down_blocks.2")))
    network, filled = made(teacher, plan)
    assert network.mid_block is None
    assert [len(block.resnets) for block in (*network.down_blocks, *network.up_blocks)] == [1, 1, 2, 2]
    # The first layer on the way down, the first and the last on the way up.
    came = {"down_blocks.1.resnets.0": "down_blocks.1.resnets.0", "up_blocks.0.resnets.0": "up_blocks.1.resnets.0",
            "up_blocks.0.resnets.1": "up_blocks.1.resnets.2", "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
            "up_blocks.0.upsamplers.0.conv": "up_blocks.1.upsamplers.0.conv", "conv_in": "conv_in"}  # fmt: skip
    assert {name: plan.source(name) for name in came} == came
    for own, old in came.items():
        for name, value in network.get_submodule(own).named_parameters():
            torch.testing.assert_close(value, teacher.get_submodule(old).get_parameter(name), rtol=0, atol=0)
    assert filled == sum(p.numel() for p in network.parameters()), "both stages are 32 wide, so every weight fits"


def test_what_a_layer_now_follows_decides_whether_its_weights_fit() -> None:
    teacher = UNet2DConditionModel.from_config(big_unet().config, block_out_channels=(16, 32, 64))
    plan = unet_plan(teacher.config, NetworkShape(remove=("mid_block", "down_blocks.2")))
    network = type(teacher).from_config(teacher.config, **plan.options)
    before = network.up_blocks[0].resnets[0].conv1.weight.clone()
    plan.fill(network, teacher.state_dict())
    assert torch.equal(network.up_blocks[0].resnets[0].conv1.weight, before), "there it took 64 + 32 channels in"
    assert torch.equal(network.up_blocks[0].resnets[1].conv1.weight, teacher.up_blocks[1].resnets[1].conv1.weight)


def test_nothing_removed_leaves_the_teacher() -> None:
    for teacher, plan_of in ((big_unet(), unet_plan), (long_dit(), transformer_plan)):
        network, filled = made(teacher, plan_of(teacher.config, NetworkShape()))
        assert filled == sum(p.numel() for p in teacher.parameters())
        assert torch.equal(said(network), said(teacher))


def test_a_transformer_without_blocks_that_do_nothing_says_the_same() -> None:
    teacher = long_dit()
    with torch.no_grad():
        for index in (1, 2):  # the gates of a block come from here: without them it adds nothing
            for parameter in teacher.transformer_blocks[index].norm1.linear.parameters():
                parameter.zero_()
    for shape in (NetworkShape(layers=2), NetworkShape(remove=("transformer_blocks.1", "transformer_blocks.2"))):
        network, filled = made(teacher, transformer_plan(teacher.config, shape))
        assert len(network.transformer_blocks) == 2
        assert filled == sum(p.numel() for p in network.parameters())
        torch.testing.assert_close(said(network), said(teacher), rtol=0, atol=0)
    other, _ = made(teacher, transformer_plan(teacher.config, NetworkShape(remove=("transformer_blocks.0",))))
    assert (said(other) - said(teacher)).abs().max() > 1e-4


def test_a_unet_without_transformer_layers_that_do_nothing_says_the_same() -> None:
    teacher = big_unet()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if ".transformer_blocks.1." in name and (".to_out." in name or ".ff.net.2." in name):
                parameter.zero_()
    network, _ = made(teacher, unet_plan(teacher.config, NetworkShape(depth=1)))
    torch.testing.assert_close(said(network), said(teacher), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in teacher.parameters())


def test_attention_layers_can_be_removed_alone() -> None:
    teacher = big_unet()
    remove = ("down_blocks.0.attentions", "up_blocks.2.attentions", "mid_block.attentions")
    network, filled = made(teacher, unet_plan(teacher.config, NetworkShape(remove=remove)))
    assert type(network.down_blocks[0]).__name__ == "DownBlock2D"
    assert type(network.up_blocks[2]).__name__ == "UpBlock2D"
    assert type(network.mid_block).__name__ == "UNetMidBlock2D"
    assert type(network.down_blocks[1]).__name__ == "CrossAttnDownBlock2D"
    assert filled == sum(p.numel() for p in network.parameters())


# ---- which channels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(3, 4), Fraction(1, 4), Fraction(2, 3)])
def test_kept_channels_agree_between_layers_groups_and_heads(share: Fraction) -> None:
    def kept(start: int, width: int) -> Tensor:
        found = Plan(share=share).cut(torch.arange(start, start + width), (int(width * share),))
        assert found is not None
        return found

    both = torch.cat([kept(0, 48), kept(48, 96)])
    assert torch.equal(kept(0, 144), both), "channels of two layers side by side keep what each of them keeps"
    for parts in (4, 8):  # groups of a norm, heads
        inside = kept(0, 96).reshape(parts, -1) // (96 // parts)
        assert torch.equal(inside, torch.arange(parts)[:, None].expand_as(inside)), "none moves into another group"


def test_a_narrower_network_has_every_weight_from_the_channels_that_it_keeps() -> None:
    teacher = big_unet()
    network, filled = made(teacher, unet_plan(teacher.config, NetworkShape(channels=0.5)))
    assert filled == sum(p.numel() for p in network.parameters())
    assert list(network.config.block_out_channels) == [8, 16, 16]
    assert torch.equal(network.conv_in.weight, teacher.conv_in.weight[::2]), "all four channels of the latent go in"
    assert torch.equal(network.conv_out.weight, teacher.conv_out.weight[:, ::2])
    path = "down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k"
    own, old = (n.get_submodule(path).weight for n in (network, teacher))
    assert torch.equal(own, old[::2]), "the text is as wide as before"
    assert said(network).isfinite().all()


@pytest.mark.parametrize("name", ["sd", "dit", "sd3", "pixart", "sana"])
def test_the_family_makes_a_narrower_network_of_the_stock_class(name: str, request: pytest.FixtureRequest) -> None:
    family = load_family(request.getfixturevalue(f"{name}_folder"))
    shape = NetworkShape(channels=0.5, layers=1)
    network = family.plain_network(shape=shape)
    assert type(network) is type(family.network())
    assert family.plan(shape).fill(network, family.network().state_dict()) > 0
    whole, own = cost_of(family, family.network()), cost_of(family, network)
    assert own.parameters < 0.6 * whole.parameters
    assert 0 < own.flops < 0.6 * whole.flops


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_every_weight_of_a_narrower_transformer_with_cross_attention_is_the_teachers(
    name: str, request: pytest.FixtureRequest
) -> None:
    family, shape = load_family(request.getfixturevalue(f"{name}_folder")), NetworkShape(channels=0.5)
    network: Any = family.plain_network(shape=shape)
    assert family.plan(shape).fill(network, family.network().state_dict()) == sum(
        p.numel() for p in network.parameters()
    )
    own, old = (n.get_parameter("transformer_blocks.1.attn2.to_k.weight") for n in (network, family.network()))
    assert torch.equal(own, old[::2, ::2])
    x, null = torch.randn(1, *family.latent_shape()), family.null_condition(1)
    with torch.no_grad():
        said = family.denoiser(OwnWeights(network))(x, torch.full((1,), 0.5, dtype=torch.float64), null).native
    assert said.shape == x.shape
    assert said.isfinite().all()


def test_a_network_that_is_told_the_size_of_its_images_keeps_a_width_of_thirds() -> None:
    family = PixArt(tiny_pixart(128, 1), "tiny:pixart")
    network = family.plain_network(shape=NetworkShape(channels=0.5))  # 12 of 24 channels
    assert family.plan(NetworkShape(channels=0.5)).fill(network, family.network().state_dict()) == sum(
        p.numel() for p in network.parameters()
    )
    wide = dict(family.network_config) | {"num_attention_heads": 4, "attention_head_dim": 9, "cross_attention_dim": 36}
    with pytest.raises(UserError, match=r"these shares do: 0\.333333, 0\.666667, 1$"):
        transformer_plan(FrozenDict(wide), NetworkShape(channels=2 / 9), widths=("cross_attention_dim",), parts=12)


def test_blocks_of_flux_that_do_nothing_can_be_removed_from_both_rows(flux_folder: str) -> None:
    family = load_family(flux_folder)
    family.at_size(16)
    teacher: Any = family.network()
    for parameter in teacher.parameters():
        # weights read from a file lie where the file has them, and products differ in their last bit with
        # where in memory a matrix begins
        parameter.data = parameter.data.clone()
    teacher.single_transformer_blocks.append(copy.deepcopy(teacher.single_transformer_blocks[0]))
    teacher.register_to_config(num_single_layers=2)
    with torch.no_grad():  # the gates of a block come from here: without them it adds nothing
        for layer in ("transformer_blocks.1.norm1", "transformer_blocks.1.norm1_context",
                      "single_transformer_blocks.0.norm"):  # fmt: skip
            for parameter in teacher.get_submodule(layer).linear.parameters():
                parameter.zero_()
    shape = NetworkShape(layers=(1, 1), remove=("single_transformer_blocks.0",))
    network: Any = family.plain_network(shape=shape)
    filled = family.plan(shape).fill(network, teacher.state_dict())
    assert filled == sum(p.numel() for p in network.parameters())
    assert (len(network.transformer_blocks), len(network.single_transformer_blocks)) == (1, 1)
    x, t = torch.randn(1, *family.latent_shape()), torch.full((1,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        said = [family.denoiser(OwnWeights(n))(x, t, family.null_condition(1)).native for n in (network, teacher)]
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=0)
    own, whole = cost_of(family, network), cost_of(family, teacher)
    assert own.parameters < 0.7 * whole.parameters
    assert 0 < own.flops < 0.7 * whole.flops


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (NetworkShape(layers=1), r"layers: FLUX has 2 blocks of two streams and 1 of one; .* two numbers"),
        (NetworkShape(layers=(3, 1)), r"layers: 3 of 2 blocks cannot be kept"),
        (NetworkShape(channels=0.5), r"channels: the heads of FLUX are rotated"),
        (NetworkShape(remove=("single_transformer_blocks.1",)), r"remove: 'single_transformer_blocks\.1' is no part"),
    ],
)
def test_shapes_that_flux_cannot_have_are_refused_with_a_remedy(shape: NetworkShape, text: str) -> None:
    with pytest.raises(UserError, match=rf"student\.shape\.{text}"):
        two_row_plan(tiny_flux().transformer.config, shape)


def test_the_last_of_the_joint_blocks_stays_the_last(sd3: ModelFamily) -> None:
    plan = sd3.plan(NetworkShape(remove=("transformer_blocks.0",)))
    network = sd3.plain_network(shape=NetworkShape(remove=("transformer_blocks.0",)))
    assert plan.source("transformer_blocks.0.attn.to_q.weight") == "transformer_blocks.1.attn.to_q.weight"
    assert plan.fill(network, sd3.network().state_dict()) == sum(p.numel() for p in network.parameters())


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_operations_are_counted_block_by_block_and_by_hand(dit: ModelFamily) -> None:
    costs = []
    for layers in (1, 2, 3):
        dit.pipeline.register_modules(transformer=type(long_dit()).from_config(dit.network_config, num_layers=layers))
        costs.append(cost_of(dit, dit.network()))
    assert costs[2].flops - costs[1].flops == costs[1].flops - costs[0].flops
    tokens, width, times = 16, 16, 256
    # two products in the attention of 2 heads of 8, four projections, the feed-forward, six modulations, and the
    # embedding of the time
    products = 2 * tokens * tokens * width + tokens * (4 * width**2 + 2 * 4 * width**2) + 6 * width**2
    assert costs[1].flops - costs[0].flops == 2 * (products + times * width + width**2)


def test_a_run_says_what_the_student_costs_beside_its_teacher(sd: ModelFamily) -> None:
    shape = NetworkShape(remove=("mid_block",))
    network = sd.plain_network(shape=shape)
    share = sum(p.numel() for p in network.parameters()) / sum(p.numel() for p in sd.network().parameters())
    text = describe(sd, shape)
    assert (
        f"student: {sum(p.numel() for p in network.parameters()):,} parameters ({share:.0%} of the teacher's)" in text
    )
    assert "GFLOPs a network call" in text
    assert text.endswith("100% of its weights begin as the teacher's")


# ---- in a game -----------------------------------------------------------------------------------------------------

SHAPE = NetworkShape(channels=0.5, remove=("mid_block",))


def roles_of_a_game() -> dict[str, Any]:
    return {"teacher": Frozen(), "critic": Trained(), "student": Trained(shape=SHAPE), "average": Recorded("student")}


def size(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())


def test_only_the_student_and_what_records_it_are_smaller(sd: ModelFamily) -> None:
    cast = Cast(sd, roles_of_a_game())
    small, whole = sum(p.numel() for p in sd.plain_network(shape=SHAPE).parameters()), size(cast.parameters("critic"))
    assert size(cast.parameters("student")) == size(cast.parameters("average")) == small < whole
    assert ("student", "smaller", small, small) in cast.summary()
    for name, value in cast.parameters("average").items():
        assert torch.equal(value, cast.parameters("student")[name])
    t = torch.full((2,), 0.5, dtype=torch.float64)
    x, null = torch.randn(2, 4, 8, 8), sd.null_condition(2)
    with torch.no_grad():
        said = {name: cast.denoiser(name)(x, t, null).native for name in ("teacher", "critic", "student", "average")}
    assert torch.equal(said["critic"], said["teacher"])
    assert torch.equal(said["student"], said["average"])
    assert not torch.allclose(said["student"], said["teacher"])


def test_weights_without_a_source_are_the_same_on_every_process(sd: ModelFamily) -> None:
    roles = {"student": Trained(shape=NetworkShape(remove=("down_blocks.1",)))}
    casts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        casts.append(Cast(sd, roles, seed=5))
    first, second = (cast.parameters("student") for cast in casts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    plan = casts[0].plan("student")
    filled = plan.fill(casts[0].denoiser("student").weights.network, sd.network().state_dict())
    assert filled < size(first), "some had no source"


def test_a_smaller_student_cannot_be_a_lora(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"role 'student' is smaller than the teacher.*weights: full"):
        Cast(sd, roles_of_a_game(), lora={"student": LoraSettings(2, 2.0, ("to_q",))})


def test_a_recipe_gives_its_shape_to_the_student_alone() -> None:
    @dataclass(frozen=True)
    class Game(Denoising):
        def roles(self) -> dict[str, Any]:
            return {**roles_of_a_game(), "student": Trained(embeds_guidance=True)}

    roles = shaped_roles(Game(), SHAPE)
    assert roles == {**roles_of_a_game(), "student": Trained(embeds_guidance=True, shape=SHAPE)}
    assert shaped_roles(Game(), None) == Game().roles()


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (NetworkShape(remove=("mid_blok",)), r"remove: 'mid_blok' is no part .*; did you mean 'mid_block'"),
        (NetworkShape(remove=("down_blocks.1",)), r"remove: .* from the inside: first down_blocks\.2"),
        (NetworkShape(remove=("down_blocks.2.attentions",)), r"remove: 'down_blocks\.2\.attentions' is no part"),
        (NetworkShape(channels=0.7), r"channels: 0\.7 .* the 16, 32, 32 channels .* do: 0\.25, 0\.5, 0\.75, 1$"),
        (NetworkShape(layers=3), r"layers: 3, 3, 3 cannot be kept where the stages that are left have 2, 2, 2"),
        (NetworkShape(layers=(1, 1)), r"layers: 1, 1 cannot be kept"),
    ],
)
def test_shapes_that_no_part_of_a_unet_has_are_refused_with_a_remedy(shape: NetworkShape, text: str) -> None:
    with pytest.raises(UserError, match=rf"student\.shape\.{text}"):
        unet_plan(big_unet().config, shape)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (NetworkShape(layers=5), r"layers: 5 of 4 blocks cannot be kept; give one number from 1 to 4"),
        (NetworkShape(layers=(1, 2)), r"layers: 1, 2 of 4 blocks"),
        (NetworkShape(depth=1), r"depth: only UNets"),
        (NetworkShape(remove=("transformer_blocks.9",)), r"remove: 'transformer_blocks\.9' is no part"),
        (NetworkShape(channels=0.3), r"channels: 0\.3 does not leave.*these shares do: 0\.25, 0\.5, 0\.75, 1$"),
    ],
)
def test_shapes_that_no_part_of_a_transformer_has_are_refused_with_a_remedy(shape: NetworkShape, text: str) -> None:
    with pytest.raises(UserError, match=rf"student\.shape\.{text}"):
        transformer_plan(long_dit().config, shape)


def test_a_recipe_with_an_impossible_shape_is_refused_before_anything_is_trained(
    sd_folder: str, tmp_path: Path
) -> None:
    def refused(shape: dict[str, Any], text: str) -> None:
        content = tiny_recipe(sd_folder, tmp_path / "run", student={"shape": shape})
        content["stages"][0]["players"] = {}
        with pytest.raises(UserError, match=text):
            train(Recipe.from_mapping(content))
        assert not (tmp_path / "run" / "checkpoints").exists()

    refused({"channels": 2.0}, r"student\.shape: channels is 2; it is the share that is kept")
    refused({"chanels": 0.5}, r"student\.shape\.chanels: unknown key; did you mean 'channels'")
    refused({"layers": 0}, r"student\.shape: layers is 0; at least 1")
    refused({"remove": ["up_blocks.0"]}, r"student\.shape\.remove: 'up_blocks\.0' is no part")


def test_a_recipe_without_a_shape_has_the_fingerprint_that_it_had(sd_folder: str, tmp_path: Path) -> None:
    plain = Recipe.from_mapping(tiny_recipe(sd_folder, tmp_path / "run"))
    small = Recipe.from_mapping(tiny_recipe(sd_folder, tmp_path / "run", student={"shape": {"channels": 0.5}}))
    assert Recipe.from_mapping(tiny_recipe(sd_folder, tmp_path / "run", student={})).sha256 == plain.sha256
    assert small.sha256 != plain.sha256
    assert small.student.shape == replace(NetworkShape(), channels=0.5)
    assert Recipe.from_mapping(small.model_dump(mode="json")) == small
