"""Negative prompts by attention: the arithmetic of NASA and NAG, on single layers and on tiny stock pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from stepdistill.attention import NAG, NASA, Negative, Steering, encode_negative, steer, steered
from stepdistill.attention_processors import CrossAttention, FluxJointAttention, JointAttention, SanaAttention
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.families.tiny_flux import tiny_flux
from stepdistill.objectives.base import Frozen, Trained
from tests.families.test_export import BETAS, tiny_vae
from tests.tiny import LORA, scramble


IMAGE, TEXT, NEGATIVE = 5, 4, 3  # tokens
DIM, WIDTH = 8, 6  # features of image tokens and of text tokens


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cross_layer(kind: str = "plain") -> Any:
    """A cross-attention with a bias at its output."""
    torch.manual_seed(1)
    if kind == "sana":
        return Attention(
            DIM, WIDTH, heads=2, dim_head=4, bias=True, qk_norm="rms_norm_across_heads", kv_heads=2,
            processor=SanaAttnProcessor2_0(),
        )  # fmt: skip
    norm = "layer_norm" if kind == "normalised" else None
    residual = kind == "residual"
    return Attention(
        DIM, WIDTH, heads=2, dim_head=4, qk_norm=norm, processor=AttnProcessor2_0(), residual_connection=residual,
        rescale_output_factor=2.0 if residual else 1.0,
    )  # fmt: skip


def transparent(layer: Any) -> Any:
    """The layer with an output projection that changes nothing, so that its output is Z."""
    with torch.no_grad():
        layer.to_out[0].weight.copy_(torch.eye(DIM))
        layer.to_out[0].bias.zero_()
    return layer


def steered_output(layer: Any, rule: Any, text: Tensor, negative: Tensor, image: Tensor, **options: Any) -> Tensor:
    """The layer's output when it is given both texts."""
    kind = SanaAttention if isinstance(layer.processor, SanaAttnProcessor2_0) else CrossAttention
    plain = layer.processor
    layer.set_processor(kind(rule, negative.shape[1]))
    output: Tensor = layer(image, encoder_hidden_states=torch.cat([text, negative], 1), **options)
    layer.set_processor(plain)
    return output


# ---- one layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [NASA(0.0), NAG(0.0), NAG(3.0, beta=0.0)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "normalised", "residual", "sana"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_strength_of_zero_is_the_stock_processor_bit_by_bit(rule: Any, kind: str, masked: bool) -> None:
    layer = cross_layer(kind)
    image, text, negative = drawn(2, IMAGE, DIM), drawn(2, TEXT, WIDTH, seed=1), drawn(2, NEGATIVE, WIDTH, seed=2)
    mask = torch.tensor([[0.0, 0, 0, -1e4], [0, 0, -1e4, -1e4]])[:, None] if masked else None
    plain = layer(image, encoder_hidden_states=text, attention_mask=mask)
    both = torch.cat([mask, torch.zeros(2, 1, NEGATIVE)], -1) if mask is not None else None
    assert torch.equal(steered_output(layer, rule, text, negative, image, attention_mask=both), plain)


@torch.no_grad()
def test_the_prompt_as_its_own_negative_leaves_one_minus_alpha_of_it() -> None:
    layer = transparent(cross_layer()).double()
    image, text = drawn(2, IMAGE, DIM).double(), drawn(2, TEXT, WIDTH, seed=1).double()
    plain = layer(image, encoder_hidden_states=text)
    for rule, left in ((NASA(0.3), 0.7), (NASA(1.0), 0.0), (NAG(3.0), 1.0)):
        found = steered_output(layer, rule, text, text, image)
        torch.testing.assert_close(found, left * plain, rtol=0, atol=1e-12)


@torch.no_grad()
def test_equal_negative_values_are_subtracted_for_any_query() -> None:
    """Attention weights sum to 1, so equal rows u of V- give Z = Z+ - alpha u, whatever the keys are."""
    layer = transparent(cross_layer()).double()
    layer.to_v.weight[:, 0] = 0  # values do not see the first feature, keys do
    negative = drawn(1, 1, WIDTH, seed=2).double().expand(2, NEGATIVE, WIDTH).clone()
    negative[..., 0] = drawn(2, NEGATIVE, seed=3)
    text, u = drawn(2, TEXT, WIDTH, seed=1).double(), layer.to_v(negative)[0, 0]
    for seed in (4, 5):
        image = drawn(2, IMAGE, DIM, seed=seed).double()
        plain = layer(image, encoder_hidden_states=text)
        found = steered_output(layer, NASA(0.7), text, negative, image)
        torch.testing.assert_close(found, plain - 0.7 * u, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_bias_of_the_output_projection_is_added_once() -> None:
    layer = cross_layer()
    layer.to_out[0].weight.zero_()
    bias = layer.to_out[0].bias
    assert bias.abs().min() > 0
    image, text, negative = drawn(2, IMAGE, DIM), drawn(2, TEXT, WIDTH, seed=1), drawn(2, NEGATIVE, WIDTH, seed=2)
    for rule in (NASA(0.5), NAG(2.0)):
        assert torch.equal(steered_output(layer, rule, text, negative, image), bias.expand(2, IMAGE, DIM))


@torch.no_grad()
def test_padding_of_either_text_counts_for_nothing() -> None:
    layer = cross_layer()
    image, text, negative = drawn(2, IMAGE, DIM), drawn(2, TEXT, WIDTH, seed=1), drawn(2, NEGATIVE, WIDTH, seed=2)
    expected = steered_output(layer, NASA(0.5), text, negative, image)
    padding = 100 * drawn(2, 2, WIDTH, seed=3)
    hide, show = torch.full((2, 1, 2), -1e4), torch.zeros
    long_negative = steered_output(
        layer, NASA(0.5), text, torch.cat([negative, padding], 1), image,
        attention_mask=torch.cat([show(2, 1, TEXT + NEGATIVE), hide], -1),
    )  # fmt: skip
    long_text = steered_output(
        layer, NASA(0.5), torch.cat([text, padding], 1), negative, image,
        attention_mask=torch.cat([show(2, 1, TEXT), hide, show(2, 1, NEGATIVE)], -1),
    )  # fmt: skip
    unmasked = steered_output(layer, NASA(0.5), text, torch.cat([negative, padding], 1), image)
    torch.testing.assert_close(long_negative, expected)
    torch.testing.assert_close(long_text, expected)
    assert (unmasked - expected).abs().max() > 1e-2


# ---- rules -------------------------------------------------------------------------------------------------------


def test_nag_limits_the_length_and_blends() -> None:
    positive, negative = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[-1.0, 1.0]]])
    # Z~ = (1, -1) + 2 (2, -2) = (5, -5), five times as long as Z+; limited to 2.5 times: (2.5, -2.5)
    torch.testing.assert_close(NAG(2.0, tau=2.5, beta=1.0).mix(positive, negative), 2.5 * positive)
    torch.testing.assert_close(NAG(2.0, tau=2.5, beta=0.2).mix(positive, negative), 1.3 * positive)
    torch.testing.assert_close(NAG(2.0, tau=9.0, beta=1.0).mix(positive, negative), 5 * positive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_nag_never_exceeds_tau_times_the_length_of_the_prompts_attention(tau: float, dtype: torch.dtype) -> None:
    positive, negative = drawn(4, 50, 32).to(dtype), (10 * drawn(4, 50, 32, seed=1)).to(dtype)
    limited = NAG(8.0, tau=tau, beta=1.0).mix(positive, negative)
    assert limited.dtype == dtype
    ratio = limited.double().abs().sum(-1) / positive.double().abs().sum(-1)
    assert ratio.max() <= tau * (1.01 if dtype == torch.bfloat16 else 1.00001)
    assert ratio.min() > 0.9 * tau, "so strong a negative reaches the limit everywhere"


def test_nag_of_nothing_is_nothing() -> None:
    zero = torch.zeros(1, 2, 4)
    assert torch.equal(NAG(2.0).mix(zero, zero), zero)
    assert torch.isfinite(NAG(2.0).mix(zero, torch.ones_like(zero))).all()


@pytest.mark.parametrize(
    "make", [lambda: NASA(-0.1), lambda: NASA(float("nan")), lambda: NAG(-1), lambda: NAG(1, tau=0.5),
             lambda: NAG(1, beta=1.5)],
)  # fmt: skip
def test_strengths_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="must be at least"):
        make()


# ---- joint attention ---------------------------------------------------------------------------------------------


def joint_layer(*, last: bool) -> Any:
    torch.manual_seed(2)
    return Attention(
        DIM, None, added_kv_proj_dim=DIM, heads=2, dim_head=4, out_dim=DIM, context_pre_only=last, bias=True,
        qk_norm="rms_norm", processor=JointAttnProcessor2_0(),
    )  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_joint_attention_mixes_the_image_tokens_and_keeps_both_texts_apart(last: bool) -> None:
    layer = transparent(joint_layer(last=last))
    image, text, negative = drawn(2, IMAGE, DIM), drawn(2, TEXT, DIM, seed=1), drawn(2, NEGATIVE, DIM, seed=2)
    towards, text_out = layer(image, encoder_hidden_states=text)
    away, negative_out = layer(image, encoder_hidden_states=negative)
    rule = NAG(2.0)
    layer.set_processor(JointAttention(rule, NEGATIVE))
    mixed, texts = layer(image, encoder_hidden_states=torch.cat([text, negative], 1))
    torch.testing.assert_close(mixed, rule.mix(towards, away))
    torch.testing.assert_close(texts, torch.cat([text_out, negative_out], 1))


def turned(places: list[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of tokens at these places, as FLUX's network makes them."""
    angles = torch.tensor(places)[:, None] * torch.tensor([1.0, 1.0, 0.3, 0.3])
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("streams", [1, 2])
@torch.no_grad()
def test_flux_mixes_the_image_tokens_and_keeps_both_texts_apart_in_one_stream_and_in_two(streams: int) -> None:
    torch.manual_seed(2)
    text_width = DIM if streams == 2 else None
    layer: Any = FluxAttention(DIM, 2, 4, bias=True, added_kv_proj_dim=text_width, pre_only=streams == 1, out_dim=DIM)
    if streams == 2:
        transparent(layer)
    image, text, negative = drawn(2, IMAGE, DIM), drawn(2, TEXT, DIM, seed=1), drawn(2, NEGATIVE, DIM, seed=2)

    def asked(words: Tensor) -> tuple[Tensor, Tensor]:
        rotation = turned([0] * words.shape[1] + [*range(1, 1 + IMAGE)])
        if streams == 2:
            return layer(image, encoder_hidden_states=words, image_rotary_emb=rotation)
        both = layer(torch.cat([words, image], 1), image_rotary_emb=rotation)
        return both[:, words.shape[1] :], both[:, : words.shape[1]]

    towards, text_out = asked(text)
    away, negative_out = asked(negative)
    rule = NAG(2.0)
    processor = FluxJointAttention(rule, NEGATIVE)
    processor.texts = TEXT + NEGATIVE
    layer.set_processor(processor)
    mixed, texts = asked(torch.cat([text, negative], 1))
    torch.testing.assert_close(mixed, rule.mix(towards, away))
    torch.testing.assert_close(texts, torch.cat([text_out, negative_out], 1))
    assert (mixed - towards).abs().max() > 1e-3


# ---- networks ----------------------------------------------------------------------------------------------------


class Called:
    """A tiny network with everything that a call of it needs but the text."""

    def __init__(self, network: nn.Module, width: int, *, masked: bool, **options: Any) -> None:
        self.network, self.width, self.masked, self.options = network.eval(), width, masked, options

    @torch.no_grad()
    def __call__(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        options = {name: value[: len(text)] for name, value in self.options.items()}
        if self.masked:
            options["encoder_attention_mask"] = torch.ones(text.shape[:2]) if mask is None else mask
        x = drawn(2, 4, 8, 8)[: len(text)]
        output: Tensor = self.network(x, encoder_hidden_states=text, return_dict=False, **options)[0]
        return output


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(3)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=WIDTH,
    )  # fmt: skip


def called(kind: str, sd: ModelFamily | None = None) -> Called:
    time = torch.tensor([500.0, 500.0])
    torch.manual_seed(3)
    if kind == "unet":
        assert sd is not None
        return Called(sd.network(), 16, masked=False, timestep=time)
    if kind == "pixart":
        return Called(pixart(), WIDTH, masked=True, timestep=time)
    if kind == "sana":
        return Called(
            SanaTransformer2DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
                num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
                caption_channels=WIDTH, sample_size=8, mlp_ratio=1.0, qk_norm="rms_norm_across_heads",
            ), WIDTH, masked=True, timestep=time,
        )  # fmt: skip
    return Called(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=5, out_channels=4,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        ), WIDTH, masked=False, timestep=time, pooled_projections=drawn(2, 5, seed=9),
    )  # fmt: skip


NETWORKS = ["unet", "pixart", "sana", "sd3"]


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_of_network_is_steered_and_restored(kind: str, sd: ModelFamily) -> None:
    network = called(kind, sd)
    text, negative = drawn(2, TEXT, network.width, seed=1), drawn(2, NEGATIVE, network.width, seed=2)
    plain = network(text)
    processors = dict(network.network.attn_processors)
    hooks = len(network.network._forward_pre_hooks)
    with Steering(network.network, NAG(0.0), Negative(negative)):
        torch.testing.assert_close(network(text), plain)
    with Steering(network.network, NAG(4.0), Negative(text)):
        torch.testing.assert_close(network(text), plain)  # nothing to keep away from
    with Steering(network.network, NAG(4.0), Negative(negative)):
        assert (network(text) - plain).abs().max() > 1e-4
    assert torch.equal(network(text), plain)
    assert len(network.network._forward_pre_hooks) == hooks
    restored = network.network.attn_processors
    assert all(restored[name] is processor for name, processor in processors.items())


@pytest.mark.parametrize("kind", ["unet", "pixart", "sana"])
def test_rows_of_a_batch_do_not_see_each_others_negatives(kind: str, sd: ModelFamily) -> None:
    network = called(kind, sd)
    text, negative = drawn(2, TEXT, network.width, seed=1), drawn(2, NEGATIVE, network.width, seed=2)
    with Steering(network.network, NASA(0.5), Negative(negative)):
        both = network(text)
    with Steering(network.network, NASA(0.5), Negative(negative[:1])):
        shared = network(text)
        alone = network(text[:1])
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(shared[:1], alone)
    assert (both[1] - shared[1]).abs().max() > 1e-4


def test_masks_of_prompt_and_negative_are_applied_separately() -> None:
    network = called("pixart")
    text, negative = drawn(2, TEXT, WIDTH, seed=1), drawn(2, NEGATIVE, WIDTH, seed=2)
    with Steering(network.network, NASA(0.5), Negative(negative)):
        expected = network(text)
    padding, kept = 100 * drawn(2, 2, WIDTH, seed=3), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    padded = Negative(torch.cat([negative, padding], 1), kept)
    with Steering(network.network, NASA(0.5), padded):
        torch.testing.assert_close(network(text), expected)
        mask = torch.tensor([[1.0, 1, 1, 1, 0, 0]] * 2)
        torch.testing.assert_close(network(torch.cat([text, padding], 1), mask), expected)


def test_a_wrong_number_of_negatives_is_told(sd: ModelFamily) -> None:
    network = called("unet", sd)
    with (
        Steering(network.network, NASA(0.5), Negative(drawn(3, NEGATIVE, 16))),
        pytest.raises(UserError, match="3 negative prompts for 2 rows"),
    ):
        network(drawn(2, TEXT, 16))


def test_an_error_inside_takes_the_steering_off_as_well(sd: ModelFamily) -> None:
    unet = sd.network()
    before = dict(unet.attn_processors)
    with pytest.raises(RuntimeError), Steering(unet, NASA(0.5), Negative(drawn(1, NEGATIVE, 16))):
        raise RuntimeError
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_steering_is_not_piled_up(sd: ModelFamily) -> None:
    steering, other = (Steering(sd.network(), NASA(0.5), Negative(drawn(1, NEGATIVE, 16))) for _ in range(2))
    steering.install()
    for again in (other.install, steering.install):
        with pytest.raises(UserError, match="steered already"):
            again()
    with pytest.raises(UserError, match="steered already"):
        Steering(sd.network(), NASA(0.5), Negative(drawn(1, NEGATIVE, 16)))
    steering.remove()
    steering.remove()
    other.install().remove()


def test_what_cannot_be_steered_says_why(sd: ModelFamily, dit: ModelFamily) -> None:
    negative = Negative(drawn(1, NEGATIVE, 16))
    with pytest.raises(UserError, match="no attention to text"):
        Steering(dit.network(), NASA(0.5), negative)
    with pytest.raises(UserError, match="DiTPipeline cannot be given a negative prompt"):
        steer(dit.pipeline, "3", NASA(0.5))
    with pytest.raises(UserError, match="joint attention; use NAG"):
        Steering(called("sd3").network, NASA(0.5), negative)
    with pytest.raises(UserError, match="conditioned on class_labels"):
        steered(dit.denoiser(), NASA(0.5), dit.null_condition(1))
    sd.network().set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match=r"attn2: AttnProcessor cannot be steered"):
        Steering(sd.network(), NASA(0.5), negative)


# ---- stock pipelines ---------------------------------------------------------------------------------------------


def tiny_pixart() -> PixArtAlphaPipeline:
    transformer = pixart()
    words = {"<pad>": 0, "</s>": 1, "red": 2, "ring": 3, "blue": 4}
    tokens = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(4)
    config = T5Config(vocab_size=5, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pipeline = PixArtAlphaPipeline(
        tokenizer, T5EncoderModel(config).eval(), tiny_vae().eval(), transformer.eval(), DDIMScheduler(**BETAS)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompts: list[str]) -> Tensor:
    name = type(pipeline).__name__
    options: dict[str, Any] = {"clean_caption": False, "use_resolution_binning": False} if "Pix" in name else {}
    if name == "FluxPipeline":
        options = {"height": 16, "width": 16}
    images: Tensor = pipeline(
        prompts, num_inference_steps=1, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "pixart_sigma", "sana", "flux"])
def test_nag_steers_every_stock_pipeline_to_its_end_and_nasa_those_with_cross_attention(
    kind: str, request: pytest.FixtureRequest
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(f"{kind}_folder"))
    pipeline.set_progress_bar_config(disable=True)
    prompts, network = ["red", "a ring"], pipeline.components.get("unet") or pipeline.components["transformer"]
    calls: list[int] = []
    network.register_forward_hook(lambda module, args, output: calls.append(1))
    plain = draw(pipeline, prompts)
    rules = [NAG(4.0)] if kind in ("sd3", "flux") else [NAG(4.0), NASA(0.5)]
    for rule in rules:
        with steer(pipeline, "blue", rule):
            assert (draw(pipeline, prompts) - plain).abs().max() > 1e-4, rule
        with steer(pipeline, "blue", replace(rule, **{"phi" if rule.joint else "alpha": 0.0})):
            torch.testing.assert_close(draw(pipeline, prompts), plain, rtol=0, atol=1e-5)
    assert torch.equal(draw(pipeline, prompts), plain)
    assert len(calls) == 2 + 2 * len(rules), "one call each"
    with steer(pipeline, ["blue", "ring"], NAG(4.0)):
        own = draw(pipeline, prompts)
    with steer(pipeline, "blue", NAG(4.0)):
        shared = draw(pipeline, prompts)
    torch.testing.assert_close(own[0], shared[0], rtol=1e-4, atol=1e-5)
    assert (own[1] - shared[1]).abs().max() > 1e-5
    if kind in ("sd3", "flux"):
        with pytest.raises(UserError, match="joint attention; use NAG"):
            steer(pipeline, "blue", NASA(0.5))


def test_fused_projections_of_flux_are_refused() -> None:
    pipeline = tiny_flux()
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(UserError, match=r"cannot be steered; only .*FluxAttnProcessor"):
        steer(pipeline, "blue", NAG(2.0))


@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_a_stock_pipeline_is_steered_at_one_call_and_restored_bit_by_bit(kind: str, sd: ModelFamily) -> None:
    pipeline = sd.pipeline if kind == "sd" else tiny_pixart()
    prompts = ["red", "a ring"]
    network = pipeline.components["unet" if kind == "sd" else "transformer"]
    rows: list[int] = []
    network.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    plain = draw(pipeline, prompts)
    steering = steer(pipeline, "blue", NASA(0.5)).install()
    moved = draw(pipeline, prompts)
    steering.remove()
    assert rows == [2, 2], "one call of as many rows as images, with and without"
    assert (moved - plain).abs().max() > 1e-4
    assert torch.equal(draw(pipeline, prompts), plain)
    with steer(pipeline, ["blue", "ring"], NAG(2.0)):
        own = draw(pipeline, prompts)
    with steer(pipeline, "blue", NAG(2.0)):
        shared = draw(pipeline, prompts)
    torch.testing.assert_close(own[0], shared[0])
    assert (own[1] - shared[1]).abs().max() > 1e-5


def test_without_strength_a_stock_pipeline_draws_the_same_bits(sd: ModelFamily) -> None:
    plain = draw(sd.pipeline, ["red", "a ring"])
    for rule in (NASA(0.0), NAG(0.0)):
        with steer(sd.pipeline, "blue", rule):
            assert torch.equal(draw(sd.pipeline, ["red", "a ring"]), plain)


def test_negatives_are_encoded_as_the_pipeline_encodes_them_for_guidance(sd: ModelFamily) -> None:
    encoded = encode_negative(sd.pipeline, ["red", "a ring"])
    assert torch.equal(encoded.tokens, sd.encode_prompts(["red", "a ring"]).tensors["prompt_embeds"])
    assert encoded.mask is None
    pipeline = tiny_pixart()
    encoded = encode_negative(pipeline, ["blue ring", "red"])
    with torch.no_grad():
        expected = pipeline.encode_prompt(["", ""], True, ["blue ring", "red"], device="cpu")
    assert torch.equal(encoded.tokens, expected[2])
    assert not torch.equal(encoded.tokens, expected[0])
    assert encoded.mask is not None and encoded.mask.sum(1).tolist() == [2, 1]


def test_an_empty_list_of_negatives_is_refused(sd: ModelFamily) -> None:
    with pytest.raises(UserError, match="no negative prompt"):
        steer(sd.pipeline, [], NASA(0.5))


# ---- training ----------------------------------------------------------------------------------------------------


def gradients(family: ModelFamily, weights: str, *, checkpointing: bool, alpha: float) -> dict[str, Tensor]:
    """Of a student's steered output, with other calls of the same network before the backward pass."""
    lora = {"student": LORA} if weights == "lora" else {}
    cast = Cast(family, {"teacher": Frozen(), "student": Trained()}, lora=lora, checkpointing=checkpointing)
    parameters = cast.parameters("student")
    if lora:
        scramble(parameters)
    x, t = drawn(2, *family.latent_shape()), torch.tensor([0.9, 0.9], dtype=torch.float64)
    condition, negative = family.encode_prompts(["red", "a ring"]), cast.encode(["blue", "c"])
    student = steered(cast.denoiser("student"), NASA(alpha), negative) if alpha else cast.denoiser("student")
    if checkpointing:
        assert any(vars(m).get("gradient_checkpointing") for m in student.weights.network.modules())
    with cast.trainable(("student",)):
        said = student(x, t, condition).native
        with torch.no_grad():
            cast.denoiser("teacher")(x, t, condition)
        said.square().mean().backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_gradients_of_a_steered_student_are_the_same_with_activation_checkpointing(
    weights: str, sd_folder: str
) -> None:
    from stepdistill.families import load_family

    stored = gradients(load_family(sd_folder), weights, checkpointing=False, alpha=0.7)
    recomputed = gradients(load_family(sd_folder), weights, checkpointing=True, alpha=0.7)
    plain = gradients(load_family(sd_folder), weights, checkpointing=False, alpha=0.0)
    assert stored.keys() == recomputed.keys()
    for name, gradient in stored.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-7)
    assert any((stored[name] - plain[name]).abs().max() > 1e-3 * plain[name].abs().max() for name in plain)


def test_checkpointing_is_as_before_once_the_steering_is_off(sd: ModelFamily) -> None:
    cast = Cast(sd, {"teacher": Frozen(), "student": Trained()}, lora={"student": LORA}, checkpointing=True)
    modules = [m for m in sd.network().modules() if vars(m).get("gradient_checkpointing")]
    before = [m._gradient_checkpointing_func for m in modules]
    view = steered(cast.denoiser("student"), NASA(0.5), cast.encode(["blue"]))
    with view.weights.active():
        assert all(m._gradient_checkpointing_func is not f for m, f in zip(modules, before, strict=True))
    assert all(m._gradient_checkpointing_func is f for m, f in zip(modules, before, strict=True))


@torch.no_grad()
def test_only_the_steered_view_is_steered(sd: ModelFamily) -> None:
    cast = Cast(sd, {"teacher": Frozen(), "student": Trained()}, lora={"student": LORA})
    x, t = drawn(2, *sd.latent_shape()), torch.tensor([0.9, 0.9], dtype=torch.float64)
    condition = sd.encode_prompts(["red", "a ring"])
    before = {role: cast.denoiser(role)(x, t, condition).native for role in ("teacher", "student")}
    view = steered(cast.denoiser("student"), NASA(0.5), cast.encode(["blue"]))
    assert (view(x, t, condition).native - before["student"]).abs().max() > 1e-4
    after = {role: cast.denoiser(role)(x, t, condition).native for role in before}
    assert all(torch.equal(after[role], before[role]) for role in before)
    assert view.parameters().keys() == cast.parameters("student").keys()
    plain, own = cast.denoiser("student").weights.plain_state(), view.weights.plain_state()
    assert all(torch.equal(own[key], value) for key, value in plain.items())


def test_a_mask_in_the_condition_is_used() -> None:
    tokens, mask = drawn(2, NEGATIVE, WIDTH), torch.ones(2, NEGATIVE)
    found = Negative.of(Condition({"prompt_embeds": tokens, "prompt_attention_mask": mask}))
    assert found.tokens is tokens and found.mask is mask
