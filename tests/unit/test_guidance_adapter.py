"""Guidance adapters beside stock networks: silent at first, told what they should be, and gone without a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from stepdistill import load_adapter
from stepdistill.adapters import LoraSettings, SharedNetwork
from stepdistill.assets import assets_path
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.data.cache import weights_fingerprint
from stepdistill.errors import UserError
from stepdistill.export.lora import export_lora
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.families.tiny_pixart import tiny_pixart
from stepdistill.guidance import ADAPTER_FILE
from stepdistill.guidance.attached import AttachedAdapter
from stepdistill.guidance.files import build_adapter, save_adapter
from stepdistill.guidance.modules import (
    AdapterSettings,
    AttentionShape,
    AttentionSite,
    Form,
    GuidanceAdapter,
    Told,
)
from stepdistill.guidance.wiring import wiring_of
from stepdistill.objectives.agd import AGD
from stepdistill.objectives.base import Frozen, Recorded, Trained
from stepdistill.recipe import Recipe, build_objective
from tests.tiny import LORA, scramble


FAMILIES = ("sd", "dit", "sd3", "pixart", "sana", "flux")
FORMS: tuple[Form, ...] = ("attention", "offset")
SMALL = AdapterSettings(width=8)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelFamily:
    loaded = load_family(request.getfixturevalue(f"{request.param}_folder"))
    loaded.at_size(16 if request.param == "flux" else None)
    return loaded


def attached(family: ModelFamily, settings: AdapterSettings = SMALL, scale: float | None = 3.0) -> AttachedAdapter:
    """An adapter that has learnt something, at work."""
    adapter = build_adapter(family.network(), settings, seed=1)
    scramble(dict(adapter.sites.named_parameters()), seed=2)
    return AttachedAdapter(family.network(), adapter, scale).install()


@torch.no_grad()
def said(family: ModelFamily, prompts: tuple[str, str] = ("3", "7"), t: float = 0.4, rows: int = 2) -> Tensor:
    """The network's output, on the same noise."""
    x_t = noise_of(family)[:rows]
    condition = encoded(family, prompts)[torch.arange(rows)]
    return family.denoiser()(x_t, torch.full((rows,), t, dtype=torch.float64), condition).native


def noise_of(family: ModelFamily) -> Tensor:
    return torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(3))


def encoded(family: ModelFamily, prompts: tuple[str, ...]) -> Condition:
    texts = prompts if family.name == "dit" else ["red" if p == "3" else "a ring" for p in prompts]
    return family.encode_prompts(texts)


def image(pipeline: Any, prompt: Any = "red", **options: Any) -> Tensor:
    """What a stock pipeline makes in two steps, (1, H, W, 3)."""
    torch.manual_seed(0)
    if type(pipeline).__name__ == "FluxPipeline":
        options = {"height": 16, "width": 16, **options}
    options = {"guidance_scale": 1, **options}
    made = pipeline(
        prompt, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0), **options
    )
    return torch.from_numpy(made.images)


# ---- silent, told, gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_an_untrained_adapter_leaves_every_bit_as_it_is(family: ModelFamily, form: Form) -> None:
    before = said(family)
    adapter = build_adapter(family.network(), AdapterSettings(form, 8), seed=1)
    assert all(float(p.abs().max()) > 0 for name, p in adapter.scale.named_parameters() if "bias" not in name)
    AttachedAdapter(family.network(), adapter, 5.0).install()
    assert torch.equal(said(family), before)


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_adapter_listens_to_scale_time_and_prompt(family: ModelFamily, form: Form) -> None:
    bare = {(p, t): said(family, p, t) for p in (("3", "3"), ("7", "7")) for t in (0.4, 0.8)}
    adapter = attached(family, AdapterSettings(form, 8))
    added: list[Tensor] = []
    act = adapter.act

    def noting(site: int, x: Tensor, output: Any) -> Any:
        added.append(adapter.adapter.added(site, torch.ones_like(x), adapter._told))  # type: ignore[arg-type]
        return act(site, x, output)

    adapter.act = noting  # type: ignore[method-assign]

    def first(prompts: tuple[str, str] = ("3", "3"), t: float = 0.4) -> Tensor:
        added.clear()
        assert not torch.equal(said(family, prompts, t), bare[prompts, t])
        return added[0]

    here = first()
    assert (first(("7", "7")) - here).abs().max() > 1e-4, "the prompt"
    assert (first(t=0.8) - here).abs().max() > 1e-4, "the time"
    adapter.guidance = 6.0
    assert (first() - here).abs().max() > 1e-4, "the scale"


def plain_attention(site: AttentionSite, x: Tensor, wanted: Tensor, heads: int) -> Tensor:
    """What a site adds, written out: each head has h / heads channels of its own, side by side."""
    query, key, value = site.query(x), site.key(wanted), site.value(wanted)
    size = query.shape[2] // heads
    found = []
    for head in range(heads):
        q, k, v = (part[:, :, head * size : (head + 1) * size] for part in (query, key, value))
        found.append(torch.softmax(q @ k.mT / math.sqrt(size), dim=2) @ v)
    added: Tensor = site.out(torch.cat(found, dim=2))
    return added


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_each_head_chooses_for_itself(heads: int) -> None:
    torch.manual_seed(0)
    site = AttentionSite(6, 8, heads).double()
    scramble(dict(site.named_parameters()), seed=2)
    x, wanted = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = plain_attention(site, x, wanted, heads)
    torch.testing.assert_close(site(x, Told(wanted, None)), expected, rtol=1e-10, atol=1e-12)
    others = [plain_attention(site, x, wanted, other) for other in (1, 2, 4) if other != heads]
    assert all((other - expected).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize(("form", "heads"), [("attention", 1), ("attention", 4), ("offset", 1)])
def test_padding_of_the_prompt_is_not_heard(form: Form, heads: int) -> None:
    torch.manual_seed(0)
    adapter = GuidanceAdapter(AdapterSettings(form, 8, heads=heads), AttentionShape((("attn2", 6),), (5,), 4))
    scramble(dict(adapter.sites.named_parameters()), seed=2)
    tokens, x, mask = torch.randn(2, 7, 4), torch.randn(2, 3, 6), torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    other = torch.where(mask.bool()[..., None], tokens, 9.0)

    def added(tokens: Tensor, mask: Tensor | None) -> Tensor:
        told = adapter.tell(torch.tensor([2.0, 2.0]), [torch.ones(2, 5)], tokens, mask)
        return adapter.added(0, x, told).detach()

    heard = added(tokens, mask)
    torch.testing.assert_close(added(other, mask), heard, rtol=0, atol=0)
    torch.testing.assert_close(heard[:1], added(tokens, None)[:1], msg="a row without padding")
    assert (heard[1] - added(tokens, None)[1]).abs().max() > 1e-4
    if form == "offset":  # which knows no places
        torch.testing.assert_close(heard[1:], added(tokens[:, :3], None)[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["pixart", "sana", "flux"])
def test_it_stands_beside_every_attention_that_it_should(name: str, request: pytest.FixtureRequest) -> None:
    network = load_family(request.getfixturevalue(f"{name}_folder")).network()
    sites = [site for site, _ in wiring_of(network).shape(network).sites]
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    if name == "flux":
        assert sites == [f"{block}.attn" for block in (*blocks, "single_transformer_blocks.0")]
    else:
        assert sites == [f"{block}.attn2" for block in blocks]


def test_a_network_that_is_told_the_size_of_its_images_tells_the_adapter() -> None:
    network = tiny_pixart(128, 1).transformer
    call = {"hidden_states": torch.zeros(1, 4, 16, 16), "timestep": torch.tensor([10]),
            "encoder_hidden_states": torch.zeros(1, 3, 24)}  # fmt: skip
    told = [{"resolution": torch.tensor([[side, 64.0]]), "aspect_ratio": torch.ones(1, 1)} for side in (64.0, 32.0)]
    first, second = (
        wiring_of(network).inputs(network, (), {**call, "added_cond_kwargs": size}).embeddings[0] for size in told
    )
    assert first.shape == (1, 24)
    assert (first - second).abs().max() > 1e-4


def test_taken_off_it_leaves_no_trace(family: ModelFamily) -> None:
    network, before = family.network(), said(family)
    keys, bits, kind = [*network.state_dict()], weights_fingerprint(network), type(network)
    adapter = attached(family)
    assert not torch.equal(said(family), before)
    assert [*network.state_dict()] == keys and type(network) is kind and weights_fingerprint(network) == bits
    adapter.remove()
    adapter.remove()
    assert torch.equal(said(family), before)
    modules = [family.network(), *(layer for _, layer in adapter._wiring.sites(family.network()))]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_without_a_scale_it_rests(family: ModelFamily) -> None:
    before = said(family)
    adapter = attached(family, scale=None)
    assert torch.equal(said(family), before)
    with adapter.at(4.0):
        assert not torch.equal(said(family), before)
    assert torch.equal(said(family), before)


@pytest.mark.parametrize("form", FORMS)
def test_a_proportional_adapter_is_the_bare_network_at_scale_one_and_grows_with_it(
    sd: ModelFamily, form: Form
) -> None:
    before = said(sd)
    adapter = attached(sd, AdapterSettings(form, 8, proportional=True), scale=1.0)
    assert torch.equal(said(sd), before)
    told = {scale: adapter.adapter.tell(torch.tensor([scale]), [torch.ones(1, 32)], torch.ones(1, 3, 16))
            for scale in (2.0, 5.0)}  # fmt: skip
    assert told[5.0].strength.item() == 4 * told[2.0].strength.item() == 4.0  # type: ignore[union-attr]
    adapter.guidance = 3.0
    assert not torch.equal(said(sd), before)


def test_each_row_of_a_call_may_have_a_scale_of_its_own(family: ModelFamily) -> None:
    adapter = attached(family, scale=2.0)
    low = said(family)
    adapter.guidance = 6.0
    high = said(family)
    adapter.guidance = [2.0, 6.0]
    mixed = said(family)
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1]]), rtol=1e-5, atol=1e-6)
    assert (low[1] - high[1]).abs().max() > 1e-4
    with pytest.raises(UserError, match="2 guidance scales for 1 rows of a network call; give one"):
        said(family, rows=1)


def test_the_network_of_the_bundled_teacher_grows_by_one_to_five_percent() -> None:
    config = json.loads((assets_path("shapes", "teacher", "unet") / "config.json").read_text())
    network = UNet2DConditionModel.from_config(config)
    stage = Recipe.load("shapes/agd").stages[0]
    objective = build_objective(stage.objective, "agd")
    assert isinstance(objective, AGD)
    adapter = build_adapter(network, objective.adapter, seed=0)
    share = sum(p.numel() for p in adapter.parameters()) / sum(p.numel() for p in network.parameters())
    assert 0.01 < share < 0.05
    assert len(adapter.sites) == 7, "every cross-attention"


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(sd: ModelFamily, tmp_path: Path) -> Iterator[Path]:
    """A trained adapter of the tiny Stable Diffusion, saved; it is on the pipeline until the test begins."""
    with attached(sd) as adapter:
        save_adapter(tmp_path / ADAPTER_FILE, sd.network(), SMALL, adapter.adapter.state_dict(), guidance=3.0)
    yield tmp_path / ADAPTER_FILE


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_every_bit_and_the_pipeline_stays_the_stock_one(
    family: ModelFamily, form: Form, tmp_path: Path
) -> None:
    settings = AdapterSettings(form, 8, heads=4 if form == "attention" else 1)
    prompt = [3] if family.name == "dit" else "red"
    plain = image(family.pipeline, prompt)
    with attached(family, settings, 2.5) as adapter:
        wanted = image(family.pipeline, prompt)
        state = adapter.adapter.state_dict()
        save_adapter(tmp_path / ADAPTER_FILE, family.network(), settings, state, guidance=2.5)
    assert (wanted - plain).abs().max() > 1e-4
    kind = type(family.pipeline)
    loaded = load_adapter(family.pipeline, tmp_path)
    assert loaded.guidance == 2.5 and type(family.pipeline) is kind
    assert torch.equal(image(family.pipeline, prompt), wanted)
    loaded.remove()
    assert torch.equal(image(family.pipeline, prompt), plain)
    with load_adapter(family.pipeline, tmp_path / ADAPTER_FILE, guidance=5.0):
        assert not torch.equal(image(family.pipeline, prompt), wanted)


def test_it_fits_a_sibling_of_the_checkpoint_and_is_told_by_the_sibling(sd: ModelFamily, file: Path) -> None:
    scramble(dict(sd.network().named_parameters()), seed=9, scale=0.1)  # another checkpoint of the same shape
    plain = image(sd.pipeline)
    adapter = load_adapter(sd.pipeline, file, guidance=4.0)
    assert (image(sd.pipeline) - plain).abs().max() > 1e-4
    adapter.remove()
    assert torch.equal(image(sd.pipeline), plain)


def test_it_goes_with_a_lora_and_each_is_taken_off_alone(sd: ModelFamily, file: Path, tmp_path: Path) -> None:
    lora = LoraSettings(2, 2.0, ("to_q", "to_v", "to_out.0", "conv1"))
    base = sd.plain_network()
    base.load_state_dict(sd.network().state_dict())
    shared = SharedNetwork(base)
    shared.add("student", lora)
    scramble(shared.parameters("student"), seed=4)
    export_lora(sd, shared.parameters("student"), rank=2, alpha=2.0, folder=tmp_path / "lora")
    pipe = sd.pipeline
    plain = image(pipe)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    stepped = image(pipe)
    adapter = load_adapter(pipe, file, guidance=4.0)
    both = image(pipe)
    assert len({float(x.sum()) for x in (plain, stepped, both)}) == 3
    merged = sd.plain_network()
    merged.load_state_dict(shared.plain_state("student"))
    adapter.remove()
    assert torch.equal(image(pipe), stepped)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), plain)
    pipe.register_modules(unet=merged)
    with load_adapter(pipe, file, guidance=4.0):
        torch.testing.assert_close(image(pipe), both, rtol=0, atol=1e-4)


def test_it_goes_beside_weights_that_wait_elsewhere(sd: ModelFamily, file: Path) -> None:
    with load_adapter(sd.pipeline, file, guidance=4.0):
        wanted = image(sd.pipeline)
    cpu_offload(sd.network(), execution_device=torch.device("cpu"))  # weights lie on "meta" between calls
    with load_adapter(sd.pipeline, file, guidance=4.0):
        assert torch.equal(image(sd.pipeline), wanted)
    remove_hook_from_module(sd.network(), recurse=True)

    class Elsewhere(ModelHook):
        """Weights that cannot compute with their inputs before the network's own forward pass has begun."""

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            module.float()
            return args, kwargs

    with load_adapter(sd.pipeline, file, guidance=4.0):
        add_hook_to_module(sd.network().double(), Elsewhere())
        assert torch.equal(image(sd.pipeline), wanted)


def test_guidance_in_two_passes_on_top_is_warned_of_once(sd: ModelFamily, file: Path) -> None:
    with load_adapter(sd.pipeline, file, guidance=4.0) as adapter:
        image(sd.pipeline)
        adapter.guidance = 1.0
        image(sd.pipeline, guidance_scale=3)
        adapter.guidance = 4.0
        with pytest.warns(RuntimeWarning, match="guided twice; call the pipeline with guidance_scale=1"):
            image(sd.pipeline, guidance_scale=3)
        image(sd.pipeline, guidance_scale=3)


def test_two_at_once_are_refused(sd: ModelFamily, file: Path) -> None:
    with load_adapter(sd.pipeline, file), pytest.raises(UserError, match="has a guidance adapter already"):
        load_adapter(sd.pipeline, file)
    load_adapter(sd.pipeline, file).remove()


def test_what_does_not_fit_is_refused_with_the_difference(
    dit: ModelFamily, sd: ModelFamily, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is for UNet2DConditionModel, and this pipeline has a DiTTransformer2DModel"):
        load_adapter(dit.pipeline, file)
    config = {**sd.network_config, "block_out_channels": (8, 24)}
    sd.pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    with pytest.raises(UserError, match=r"is for another architecture: \('.*attn2', 16\) there, .*, 24\) here"):
        load_adapter(sd.pipeline, file)


@pytest.mark.parametrize("content", ["nothing", "words", "lora", "damaged"])
def test_what_is_no_adapter_is_refused(sd: ModelFamily, file: Path, tmp_path: Path, content: str) -> None:
    other = tmp_path / "other.safetensors"
    if content == "words":
        other.write_text("words")
    elif content == "lora":
        save_file({"unet.to_q.lora_A.weight": torch.zeros(1, 1)}, other)
    elif content == "damaged":
        other.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"other\.safetensors: (cannot be read as a guidance adapter|is no guidance)"):
        load_adapter(sd.pipeline, other)
    assert not sd.network()._forward_pre_hooks


# ---- in a game -----------------------------------------------------------------------------------------------------


ROLES = {"teacher": Frozen(), "student": Trained(adapter=SMALL), "target": Recorded("student"), "critic": Trained()}


def cast_of(family: ModelFamily, **options: Any) -> Cast:
    return Cast(family, ROLES, **options)


def asked(cast: Cast, role: str, scale: float | Tensor | None = None) -> Tensor:
    x_t = noise_of(cast.family)
    condition = encoded(cast.family, ("3", "7"))
    told = condition if scale is None else condition.with_guidance(scale)
    return cast.denoiser(role)(x_t, torch.tensor([0.3, 0.9], dtype=torch.float64), told).native


def test_roles_beside_one_network_do_not_hear_each_other(family: ModelFamily) -> None:
    bare = said(family)
    cast = cast_of(family, lora={} if family.name == "dit" else {"critic": LORA})
    teacher = asked(cast, "teacher")
    assert torch.equal(asked(cast, "student", 5.0), teacher), "it starts as the teacher"
    scramble({n: p for n, p in cast.parameters("student").items() if n.startswith("sites.")})
    moved = asked(cast, "student", 5.0)
    assert not torch.equal(moved, teacher)
    assert not torch.equal(asked(cast, "student", 2.0), moved)
    assert torch.equal(asked(cast, "teacher"), teacher)
    assert torch.equal(asked(cast, "target", 5.0), teacher)
    cast.copy("student", "target")
    assert torch.equal(asked(cast, "target", 5.0), moved), "also how it embeds a scale"
    (row,) = [row for row in cast.summary() if row[0] == "student"]
    assert row[1].startswith("adapter, ") and row[2] == sum(p.numel() for p in cast.parameters("student").values())
    cast.release()
    assert torch.equal(said(family), bare)
    assert not family.network()._forward_pre_hooks


def test_a_student_that_is_not_told_the_scale_says_so(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match=r"has to be told the scale: call it with condition\.with_guidance"):
        asked(cast_of(sd), "student")


def test_it_cannot_be_a_lora_as_well(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match="'student' is an adapter beside the network and cannot be a LoRA"):
        cast_of(sd, lora={"student": LORA})


def test_checkpointing_recomputes_with_the_scale_of_the_forward_pass(family: ModelFamily) -> None:
    gradients = []
    for checkpointing in (False, True):
        cast = cast_of(family, checkpointing=checkpointing)
        scramble({n: p for n, p in cast.parameters("student").items() if n.startswith("sites.")})
        with cast.trainable(("student",)):
            loss = asked(cast, "student", torch.tensor([2.0, 6.0])).square().mean()
            with torch.no_grad():  # another call in between, with another scale
                asked(cast, "student", 9.0)
            loss.backward()
        assert all(p.grad is None for p in family.network().parameters())
        gradients.append({name: p.grad for name, p in cast.parameters("student").items()})
        cast.release()
    assert all(g is not None and float(g.abs().max()) > 0 for n, g in gradients[0].items() if n.startswith("scale."))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_a_network_without_a_wiring_is_refused(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match="guidance adapters are not made for AutoencoderKL; they are for UNet2D"):
        build_adapter(sd.pipeline.vae, SMALL, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, "even number"),
        ({"frequency": 0.0}, "above 0"),
        ({"width": 64, "heads": 5}, "heads is 5; it must divide the width, which is 64"),
        ({"heads": 0}, "heads is 0; it must divide"),
        ({"form": "offset", "heads": 2}, "attends to nothing"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AGD(**options)
