"""Negative prompts without a second network call: attention to the prompt is steered away from a second text.

    prompt tokens | negative tokens => one sequence => in every attention to text: Z+ and Z- => NASA or NAG => to_out

The negative's tokens travel behind the prompt's through the network's own text projections, so that nothing here knows
an architecture; the processors are in attention_processors.py. Letters: B batch, L text tokens, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.attention_processors import NAG, NASA, Rule, TwoTexts, attends_to_text, replacement
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, Weights
from stepdistill.errors import UserError


__all__ = ["NAG", "NASA", "Negative", "Rule", "Steering", "encode_negative", "steer", "steered"]


@dataclass(frozen=True)
class Negative:
    """Encoded negative prompts.

    Attributes:
        tokens: embeddings, (B, L, C), or (1, L, C) for one prompt that is meant for all rows.
        mask: 1 for a token and 0 for padding, (B, L); None where the network gets no mask.
    """

    tokens: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, condition: Condition) -> Negative:
        """The text in a denoiser's condition."""
        if "prompt_embeds" not in condition.tensors:
            raise UserError(f"a negative prompt needs a network that is conditioned on text; this one is conditioned "
                            f"on {', '.join(condition.tensors)}")  # fmt: skip
        return cls(condition.tensors["prompt_embeds"], condition.tensors.get("prompt_attention_mask"))

    def append_to(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Puts the negatives behind a call's text, (B, L, C), and their mask behind its mask, (B, L).

        Raises:
            UserError: there are several negative prompts, but not one for each row of the call.
        """
        rows, given = len(tokens), len(self.tokens)
        if given not in (1, rows):
            raise UserError(f"{given} negative prompts for {rows} rows of a network call; give one, or one for each "
                            "image, and call the model with guidance_scale=1")  # fmt: skip
        both = torch.cat([tokens, self.tokens.to(tokens).expand(rows, -1, -1)], dim=1)
        if mask is None and self.mask is None:
            return both, None
        given_mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
        own = self.tokens.new_ones(self.tokens.shape[:2]) if self.mask is None else self.mask
        return both, torch.cat([given_mask, own.to(given_mask).expand(rows, -1)], dim=1)


class Steering:
    """Steers one network's attention to text: as a context, or by `install` and `remove`.

    Args:
        network: a Diffusers UNet or transformer, called with `encoder_hidden_states` by name, as stock pipelines do.
        rule: NASA or NAG.
        negative: what to keep away from.

    Raises:
        UserError: the network has no attention that the rule is made for, or one whose processor is not a stock one.
    """

    def __init__(self, network: nn.Module, rule: Rule, negative: Negative) -> None:
        self._network, self._negative = network, negative
        self._layers: list[tuple[Any, TwoTexts]] = [
            (layer, replacement(name, layer, rule)(rule, negative.tokens.shape[1]))
            for name, layer in network.named_modules()
            if attends_to_text(layer)
        ]
        if not self._layers:
            raise UserError(f"{type(network).__name__} has no attention to text that could be steered")
        self._originals = [layer.processor for layer, _ in self._layers]
        self._undo = ExitStack()

    def install(self) -> Steering:
        """From now on every call of the network is steered, until `remove`.

        Raises:
            UserError: it is installed already, or the processors are not those that it was made for.
        """
        if any(layer.processor is not old for (layer, _), old in zip(self._layers, self._originals, strict=True)):
            raise UserError(f"{type(self._network).__name__}: attention is steered already or its processors were "
                            "replaced; remove the earlier steering first")  # fmt: skip
        self._undo.enter_context(self._swapped())
        handle = self._network.register_forward_pre_hook(self._append, with_kwargs=True)
        self._undo.callback(handle.remove)
        self._wrap_checkpointing()
        return self

    def remove(self) -> None:
        """Puts back the very processors that were there; does nothing if not installed."""
        self._undo.close()

    def __enter__(self) -> Steering:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        before = [layer.processor for layer, _ in self._layers]
        for layer, processor in self._layers:
            layer.set_processor(processor)
        try:
            yield
        finally:
            for (layer, _), processor in zip(self._layers, before, strict=True):
                layer.set_processor(processor)

    def _append(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the network."""
        tokens = kwargs.get("encoder_hidden_states")
        if tokens is None:
            raise UserError(f"{type(network).__name__} was called without encoder_hidden_states by name, so there is "
                            "no prompt to steer")  # fmt: skip
        tokens, mask = self._negative.append_to(tokens, kwargs.get("encoder_attention_mask"))
        changed: dict[str, Tensor] = {"encoder_hidden_states": tokens}
        if mask is not None:
            changed["encoder_attention_mask"] = mask
        places = kwargs.get("txt_ids")  # FLUX's, of every token of a text the same
        if places is not None:
            changed["txt_ids"] = places[:1].expand(tokens.shape[1], -1)
        for _, processor in self._layers:
            processor.texts = tokens.shape[1]
        return args, {**kwargs, **changed}

    def _wrap_checkpointing(self) -> None:
        """Activation checkpointing recomputes blocks in the backward pass, when other processors are in place again.

        So whatever function checkpoints the blocks (adapters put their own there) is given blocks that steer.
        """
        for module in self._network.modules():
            state: Any = vars(module)
            if state.get("gradient_checkpointing"):
                inner = state["_gradient_checkpointing_func"]
                state["_gradient_checkpointing_func"] = self._replaying(inner)
                self._undo.callback(state.__setitem__, "_gradient_checkpointing_func", inner)

    def _replaying(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
            def run(*inputs: Any) -> Any:
                with self._swapped():
                    return function(*inputs)

            return inner(run, *args)

        return checkpointed


class _Layout(NamedTuple):
    """Where an `encode_prompt` returns negative embeddings and their mask, and which arguments it needs besides.

    One without negative prompts is given them as prompts, which is what its pipeline does for guidance.
    """

    tokens: int
    mask: int | None = None
    needs: tuple[str, ...] = ()
    negatives: bool = True


LAYOUTS: Mapping[str, _Layout] = {
    "StableDiffusionPipeline": _Layout(1),
    "StableDiffusionXLPipeline": _Layout(1),
    "StableDiffusion3Pipeline": _Layout(1, None, ("prompt_2", "prompt_3")),
    "PixArtAlphaPipeline": _Layout(2, 3),
    "PixArtSigmaPipeline": _Layout(2, 3),
    "SanaPipeline": _Layout(2, 3),
    "FluxPipeline": _Layout(0, None, ("prompt_2",), negatives=False),
}


@torch.no_grad()
def encode_negative(pipeline: Any, prompts: Sequence[str]) -> Negative:
    """Negative prompts exactly as the pipeline itself encodes them for guidance.

    Raises:
        UserError: a pipeline whose `encode_prompt` is not known here.
    """
    name = type(pipeline).__name__
    if name not in LAYOUTS:
        raise UserError(f"{name} cannot be given a negative prompt here; these can: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    texts: dict[str, Any] = {"prompt": list(prompts)}
    if layout.negatives:
        texts = {"prompt": [""] * len(prompts), "negative_prompt": list(prompts), "do_classifier_free_guidance": True}
    encoded = pipeline.encode_prompt(
        **texts, device=pipeline.device, num_images_per_prompt=1, **dict.fromkeys(layout.needs)
    )
    return Negative(encoded[layout.tokens], None if layout.mask is None else encoded[layout.mask])


def steer(pipeline: Any, negative_prompt: str | Sequence[str], rule: Rule) -> Steering:
    """Keeps a stock pipeline's images away from a negative prompt, at one network call and guidance_scale=1.

        with steer(pipeline, "a red background", NASA(0.3)):
            pipeline("a blue circle", num_inference_steps=1, guidance_scale=1)

    Args:
        pipeline: a loaded Diffusers pipeline.
        negative_prompt: one text for all images, or one for each row of the network's batch.
        rule: NASA or NAG.

    Returns:
        A context; or call its `install` and `remove`. If the pipeline is called with guidance nevertheless, both of
        its halves are steered.

    Raises:
        UserError: the pipeline or its network does not support it.
    """
    prompts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    if not prompts:
        raise UserError("no negative prompt was given; give a text")
    negative = encode_negative(pipeline, prompts)
    network = pipeline.components.get("unet") or pipeline.components.get("transformer")
    if not isinstance(network, nn.Module):
        raise UserError(f"{type(pipeline).__name__} has neither unet nor transformer, so nothing can be steered")
    return Steering(network, rule, negative)


class SteeredWeights:
    """A set of weights whose network is steered while they are active."""

    def __init__(self, weights: Weights, steering: Steering) -> None:
        self._weights, self._steering = weights, steering

    @property
    def network(self) -> nn.Module:
        return self._weights.network

    @contextmanager
    def active(self) -> Iterator[None]:
        with self._weights.active(), self._steering:
            yield

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._weights.parameters()

    def plain_state(self) -> dict[str, Tensor]:
        return self._weights.plain_state()


def steered(denoiser: Denoiser, rule: Rule, negative: Condition) -> Denoiser:
    """The same view with attention steered away from a negative condition; differentiable, for training.

    Args:
        denoiser: of a network that is conditioned on text.
        rule: NASA or NAG.
        negative: as many rows as the calls will have, or one.
    """
    view = copy(denoiser)
    view.weights = SteeredWeights(denoiser.weights, Steering(denoiser.weights.network, rule, Negative.of(negative)))
    return view
