"""An adapter at work beside a network that is not changed: hooks, which can be taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.guidance.modules import GuidanceAdapter, Told
from stepdistill.guidance.wiring import wiring_of


if TYPE_CHECKING:
    from stepdistill.denoiser import NetworkCall, Weights

Guidance = float | Sequence[float] | Tensor


class AttachedAdapter:
    """One adapter beside one network, by hooks; the network's class, weights and configuration stay what they are.

    Args:
        network: a stock Diffusers network.
        adapter: made for its shape.
        guidance: see below.
        doubled: whether the pipeline that calls the network now guides it in two passes of its own, which is said once
            in a warning; None: nobody knows.

    Attributes:
        guidance: the scale of every network call, 1 = none: one number, or one for each row of the call; None lets
            the network be as it is. It may be set anew at any time.
    """

    def __init__(
        self, network: nn.Module, adapter: GuidanceAdapter, guidance: Guidance | None = None,
        doubled: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        self.network, self.adapter, self.guidance = network, adapter, guidance
        self._wiring, self._doubled = wiring_of(network), doubled
        self._source: Told | Callable[[], Told] | None = None
        self._undo = ExitStack()

    def install(self) -> AttachedAdapter:
        """From now on every call of the network is adapted, until `remove`."""
        assert not is_installed(self), "installed twice, the adapter would act twice"
        before = self.network.register_forward_pre_hook(_Listener(self), with_kwargs=True)
        self._undo.callback(before.remove)
        for number, (_, layer) in enumerate(self._wiring.sites(self.network)):
            self._undo.callback(layer.register_forward_hook(_Site(self, number), with_kwargs=True).remove)
        return self

    def remove(self) -> None:
        """Takes the hooks off: the network then is what it was, bit by bit. Does nothing if they are off."""
        self._undo.close()
        self._source = None

    def __enter__(self) -> AttachedAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def at(self, guidance: Guidance) -> Iterator[None]:
        """Inside, calls of the network have this scale, which may be a tensor (B,)."""
        before, self.guidance = self.guidance, guidance
        try:
            yield
        finally:
            self.guidance, self._source = before, None

    def capture(self) -> Callable[[], AbstractContextManager[None]]:
        """Remembers what the present network call is told => a context in which layers are told it again.

        For activation checkpointing, which computes layers once more when other calls have been made since.
        """
        told = self._told
        return lambda: self._telling(told)

    @contextmanager
    def _telling(self, told: Told | None) -> Iterator[None]:
        before, self._source = self._source, told
        try:
            yield
        finally:
            self._source = before

    def listen(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before a network call: embeds its scale, time and prompt for all sites."""
        self._source = None
        if self.guidance is None:
            return
        self._warn_of_two_passes()

        def tell() -> Told:
            inputs = self._wiring.inputs(self.network, args, kwargs)
            self.adapter.to(inputs.embeddings[0].device)  # pipelines move, and do not know of it
            return self.adapter.tell(self._scale(inputs.rows), inputs.embeddings, inputs.tokens, inputs.mask)

        # Offloaded weights come to the device after this, so a pipeline's call is told at the first of its layers.
        # With gradients it is told here: checkpointing has to find the same at every layer that it computes again.
        self._source = tell() if torch.is_grad_enabled() else tell

    @property
    def _told(self) -> Told | None:
        """What the present network call is told; None if it is to be as it was."""
        if callable(self._source):
            self._source = self._source()
        return self._source

    def act(self, site: int, x: Tensor, output: Any) -> Any:
        """What an attention layer returns instead of its own output; x is what it was given, (B, N, C)."""
        told = self._told
        if told is None:
            return output
        if isinstance(output, tuple):  # joint attention: image tokens first, then those of the text
            return output[0] + self.adapter.added(site, x, told), *output[1:]
        return output + self.adapter.added(site, x, told)

    def _warn_of_two_passes(self) -> None:
        at_one = not isinstance(self.guidance, Tensor | Sequence) and self.guidance == 1
        if self._doubled is None or at_one or not self._doubled():
            return
        self._doubled = None
        text = ("the pipeline guides in two passes, and a guidance adapter is at work as well, so images are guided "
                "twice; call the pipeline with guidance_scale=1")  # fmt: skip
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _scale(self, rows: int) -> Tensor:
        device = self.adapter.scale.phases.device
        scale = torch.as_tensor(self.guidance, dtype=torch.float64, device=device).reshape(-1)
        if len(scale) not in (1, rows):
            raise UserError(f"{len(scale)} guidance scales for {rows} rows of a network call; give one, or one for "
                            "each image, and call the pipeline with guidance_scale=1")  # fmt: skip
        return scale.expand(rows)


class _Listener:
    """Forward pre-hook of the network."""

    def __init__(self, attached: AttachedAdapter) -> None:
        self.attached = attached

    def __call__(self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.attached.listen(args, kwargs)


class _Site:
    """Forward hook of an attention layer."""

    def __init__(self, attached: AttachedAdapter, number: int) -> None:
        self._attached, self._number = attached, number

    def __call__(self, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        return self._attached.act(self._number, args[0] if args else kwargs["hidden_states"], output)


def adapters_of(network: nn.Module) -> list[AttachedAdapter]:
    """The adapters that are installed on a network."""
    hooks = network._forward_pre_hooks.values()
    return [hook.attached for hook in hooks if isinstance(hook, _Listener)]


def is_installed(attached: AttachedAdapter) -> bool:
    """Whether its hooks are on."""
    return any(other is attached for other in adapters_of(attached.network))


class BesideWeights:
    """A network's weights with an adapter beside them: the adapter is what is trained.

    Args:
        base: the network's own weights.
        attached: installed on the same network.
    """

    def __init__(self, base: Weights, attached: AttachedAdapter) -> None:
        self._base, self.attached = base, attached

    @property
    def network(self) -> nn.Module:
        return self._base.network

    def active(self) -> AbstractContextManager[None]:
        return self._base.active()

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.attached.adapter.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """All of the adapter: its parameters, and the features by which it embeds a scale."""
        return {**self.parameters(), **dict(self.attached.adapter.named_buffers())}

    @property
    def share(self) -> float:
        """The adapter's parameters as a share of the network's."""
        network = sum(p.numel() for p in self.network.parameters())
        return sum(p.numel() for p in self.parameters().values()) / network

    def plain_state(self) -> dict[str, Tensor]:
        raise UserError("no plain network computes what a guidance adapter adds beside attention; it is used through "
                        "stepdistill.load_adapter")  # fmt: skip

    def told(self, forward: NetworkCall) -> NetworkCall:
        """How the architecture is called, its adapter being told the tensor "guidance", (B,), of the condition."""

        def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            tensors = dict(condition.tensors)
            if "guidance" not in tensors:
                raise UserError("a denoiser with a guidance adapter has to be told the scale: call it with "
                                "condition.with_guidance(scale)")  # fmt: skip
            with self.attached.at(tensors.pop("guidance")):
                return forward(network, x_t, model_time, Condition(tensors))

        return call
